"""Forward passes over the pool: pieces of prompts and single tokens of running sequences, in one pass."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from inference_service.kv_pool import KVPool
from inference_service.packed_pass import PackedPass
from inference_service.pieces import Piece, leading_rows

if TYPE_CHECKING:
    from inference_service.model import LoadedModel


class Runner:
    """Runs a model's forward passes with the pool as its key/value memory. Holds no request.

    A model that takes packed passes computes all pieces in one, so that its weights are read once; any other computes
    the running rows together and each other piece alone.
    """

    def __init__(self, model: "LoadedModel", pool: KVPool) -> None:
        self._model = model.model
        self._device = model.device
        self._packs = model.packs
        self.pool = pool
        # Eager attention adds the mask to the scores, SDPA takes a boolean one.
        self._additive = model.model.config._attn_implementation == "eager"
        self._least = torch.finfo(model.dtype).min
        self._dtype = model.dtype

    @property
    def rows(self) -> int:
        return self.pool.rows

    @torch.inference_mode()
    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Compute the pieces, each of another row, over what their rows already hold.

        Single tokens of the first rows, in the rows' order and before all other pieces, attend together.
        Returns the logits after the last token of each, `[pieces, vocabulary]`.
        """
        rows = leading_rows(pieces)
        if self._packs:
            return self._packed(pieces, rows)
        logits = [self._prefill(piece) for piece in pieces[rows:]]
        return torch.cat([self._decode(pieces[:rows]), *logits] if rows else logits)

    def _packed(self, pieces: Sequence[Piece], rows: int) -> torch.Tensor:
        packed = PackedPass(self.pool, pieces, rows)
        output = self._model(
            input_ids=torch.tensor([packed.tokens], device=self._device),
            attention_mask=packed.no_mask,
            position_ids=packed.positions[None],
            past_key_values=packed,
            use_cache=True,
            logits_to_keep=packed.last_tokens,
            packed_pass=packed,
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _prefill(self, piece: Piece) -> torch.Tensor:
        self.pool.begin_prefill(piece.row, piece.start, len(piece.tokens))
        positions = torch.arange(piece.start, piece.end, device=self._device)
        mask = torch.arange(piece.end, device=self._device)[None, :] <= positions[:, None]
        return self._forward(torch.tensor([piece.tokens], device=self._device), positions[None], mask[None, None])

    def _decode(self, pieces: Sequence[Piece]) -> torch.Tensor:
        positions = torch.tensor([piece.start for piece in pieces], device=self._device)
        length = max(piece.end for piece in pieces)
        self.pool.begin_decode(positions, length)
        mask = torch.arange(length, device=self._device)[None, :] <= positions[:, None]
        input_ids = torch.tensor([piece.tokens for piece in pieces], device=self._device)
        return self._forward(input_ids, positions[:, None], mask[:, None, None])

    def _forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self._additive:
            mask = torch.zeros(mask.shape, dtype=self._dtype, device=self._device).masked_fill_(~mask, self._least)
        output = self._model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=self.pool,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

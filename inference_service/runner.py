"""Forward passes over the pool: pieces of prompts and single tokens of running sequences, in one pass."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from inference_service.active_sequence import Piece, leading_rows
from inference_service.attention_interface import EAGER, computed_by
from inference_service.attention_window import FULL, AttentionWindow
from inference_service.kv_pool import KVPool
from inference_service.packed_pass import PackedPass, as_given

if TYPE_CHECKING:
    from inference_service.model import LoadedModel


class Runner:
    """Runs a model's forward passes with the pool as its key/value memory. Holds no request.

    A model that takes packed passes computes all pieces in one, so that its weights are read once; any other computes
    the running rows together, where it can, and each other piece alone.
    """

    def __init__(self, model: "LoadedModel", pool: KVPool) -> None:
        self._model = model.model
        self._device = model.device
        self._packs, self._batches = model.packs, model.batches
        self.pool = pool
        self._windows: tuple[AttentionWindow, ...] = model.windows or (FULL,) * pool.shape.layers
        # Eager attention adds the mask to the scores, SDPA takes a boolean one.
        implementation = model.model.config._attn_implementation
        self._additive = model.dtype if implementation in ("eager", EAGER) else None
        self._layer_types: Sequence[str] = getattr(model.model.config.get_text_config(), "layer_types", None) or ()

    @property
    def rows(self) -> int:
        return self.pool.rows

    @torch.inference_mode()
    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Compute the pieces, each of another row, over what their rows already hold.

        Single tokens of the first rows, in the rows' order and before all other pieces, attend together.
        Returns the logits after the last token of each piece, or after each token if the piece is scored:
        `[logit rows, vocabulary]`.
        """
        rows = leading_rows(pieces) if self._packs or self._batches else 0
        if self._packs:
            return self._packed(pieces, rows)
        logits = [self._prefill(piece) for piece in pieces[rows:]]
        return torch.cat([self._decode(pieces[:rows]), *logits] if rows else logits)

    def _packed(self, pieces: Sequence[Piece], rows: int) -> torch.Tensor:
        packed = PackedPass(self.pool, pieces, rows, self._windows, self._additive)
        with computed_by(packed):
            output = self._model(
                input_ids=torch.tensor([packed.tokens], device=self._device),
                attention_mask=packed.no_mask,
                position_ids=packed.positions[None],
                past_key_values=packed,
                use_cache=True,
                logits_to_keep=packed.scored_tokens,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _prefill(self, piece: Piece) -> torch.Tensor:
        self.pool.begin_prefill(piece.row, piece.start, len(piece.tokens))
        positions = torch.arange(piece.start, piece.end, device=self._device)
        masks = {window: window.mask(positions, 0, piece.end)[None, None] for window in dict.fromkeys(self._windows)}
        return self._forward(
            torch.tensor([piece.tokens], device=self._device), positions[None], masks, piece.logit_rows
        )

    def _decode(self, pieces: Sequence[Piece]) -> torch.Tensor:
        positions = torch.tensor([piece.start for piece in pieces], device=self._device)
        length = max(piece.end for piece in pieces)
        self.pool.begin_decode(positions, length)
        masks = {window: window.mask(positions, 0, length)[:, None, None] for window in dict.fromkeys(self._windows)}
        input_ids = torch.tensor([piece.tokens for piece in pieces], device=self._device)
        return self._forward(input_ids, positions[:, None], masks)

    def _forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        masks: dict[AttentionWindow, torch.Tensor],
        logit_rows: int = 1,
    ) -> torch.Tensor:
        """The logits after the last `logit_rows` tokens of each row of `input_ids`, one row after the other."""
        given = {window: as_given(mask, self._additive) for window, mask in masks.items()}
        mask: Any
        if len(given) == 1:
            (mask,) = given.values()
        else:  # the models of the library take a mask for each type of layer
            mask = {kind: given[window] for kind, window in zip(self._layer_types, self._windows, strict=True)}
        output = self._model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=self.pool,
            use_cache=True,
            logits_to_keep=logit_rows,
        )
        logits: torch.Tensor = output.logits[:, -logit_rows:].flatten(0, 1)
        return logits

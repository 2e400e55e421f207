"""Forward passes over the pool: prefill of one row, decode of all rows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from inference_service.kv_pool import KVPool

if TYPE_CHECKING:
    from inference_service.model import LoadedModel


class Runner:
    """Runs a model's forward passes with the pool as its key/value memory. Holds no request."""

    def __init__(self, model: "LoadedModel", pool: KVPool) -> None:
        self._model = model.model
        self._device = model.device
        self.pool = pool
        # Eager attention adds the mask to the scores, SDPA takes a boolean one.
        self._additive = model.model.config._attn_implementation == "eager"
        self._least = torch.finfo(model.dtype).min
        self._dtype = model.dtype

    @property
    def rows(self) -> int:
        return self.pool.rows

    @torch.inference_mode()
    def prefill(self, row: int, tokens: Sequence[int], start: int) -> torch.Tensor:
        """Compute `tokens` of `row` from position `start` on, over what the row already holds.

        Returns the logits after the last token, `[vocabulary]`.
        """
        end = start + len(tokens)
        self.pool.begin_prefill(row, start, len(tokens))
        positions = torch.arange(start, end, device=self._device)
        mask = torch.arange(end, device=self._device)[None, :] <= positions[:, None]
        return self._forward(torch.tensor([tokens], device=self._device), positions[None], mask[None, None])[0]

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """One token in each of the first `len(tokens)` rows, which hold `lengths` tokens.

        Returns the logits, `[running, vocabulary]`.
        """
        positions = torch.tensor(lengths, device=self._device)
        length = max(lengths) + 1
        self.pool.begin_decode(positions, length)
        mask = torch.arange(length, device=self._device)[None, :] <= positions[:, None]
        input_ids = torch.tensor(tokens, device=self._device)[:, None]
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

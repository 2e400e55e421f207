"""Which earlier tokens the tokens of a layer attend to: all of them, those in a sliding window, or those in a chunk."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import sdpa_mask

from inference_service.attention_interface import Compute, computed_by


@dataclass(frozen=True)
class AttentionWindow:
    """The token at position `p` attends to the tokens from `first_seen(p)` to `p`."""

    size: int | None = None
    """Maximum number of tokens that a token attends to, itself included. None: no limit."""
    chunked: bool = False
    """True if the window does not slide: positions are cut into chunks of `size`, and a token attends to its chunk."""

    def first_seen(self, position: int) -> int:
        """The earliest position that the token at `position` attends to."""
        if self.size is None:
            return 0
        return position // self.size * self.size if self.chunked else max(0, position - self.size + 1)

    def mask(self, positions: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """`[tokens, end - begin]`: for each of the `positions` (`[tokens]`), which of the positions from `begin` to
        before `end` its token attends to.
        """
        columns, positions = torch.arange(begin, end, device=positions.device), positions[:, None]
        mask = columns <= positions
        if self.size is None or end <= self.size:
            return mask
        if self.chunked:
            return mask & (columns >= positions // self.size * self.size)
        return mask & (columns > positions - self.size)


FULL = AttentionWindow()


class _Probe:
    """Records, in one forward pass, which mask each layer's attention gets. Holds no keys and values."""

    is_compileable = False

    def __init__(self, layers: int) -> None:
        self.layers = [None] * layers
        self._layer = 0
        self._masks: list[tuple[torch.Tensor, Callable[..., Any], int | None]] = []
        self.seen: dict[int, tuple[Callable[..., Any], int | None]] = {}

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._layer = layer_idx
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    def note_mask(self, mask: torch.Tensor, mask_function: Callable[..., Any], local_size: int | None) -> None:
        self._masks.append((mask, mask_function, local_size))  # the mask is kept, so that no other takes its memory

    def attend(
        self,
        compute: Compute,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        for made, mask_function, local_size in self._masks:
            if mask is not None and mask.untyped_storage().data_ptr() == made.untyped_storage().data_ptr():
                self.seen[self._layer] = (mask_function, local_size)
        return compute(query, key, value, mask)[0]


@torch.inference_mode()
def find_windows(model: Any, layers: int, max_len: int) -> tuple[AttentionWindow, ...]:
    """The window of each layer, from the masks that the model itself makes.

    The model must use an attention implementation of `attention_interface`. Rows hold `max_len` tokens. Raises
    `ValueError` for a layer whose mask is not known or is of another kind.
    """
    probe = _Probe(layers)
    tokens = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    with computed_by(probe):
        model(
            input_ids=tokens,
            position_ids=torch.arange(2, device=model.device)[None],
            past_key_values=probe,
            use_cache=True,
            logits_to_keep=1,
        )
    known: dict[tuple[Callable[..., Any], int | None], AttentionWindow] = {}
    windows = []
    for layer in range(layers):
        if layer not in probe.seen:
            raise ValueError(f"layer {layer} is given a mask that the library did not make")
        made_by = probe.seen[layer]
        if made_by not in known:
            known[made_by] = _window_of(*made_by, max_len)
        windows.append(known[made_by])
    return tuple(windows)


def _window_of(mask_function: Callable[..., Any], local_size: int | None, max_len: int) -> AttentionWindow:
    """The window that has the same mask as the library's `mask_function`. Its size, if any, is `local_size`."""
    candidates = [FULL]
    if local_size is not None and local_size < max_len:
        candidates += [AttentionWindow(local_size), AttentionWindow(local_size, chunked=True)]
    borders = [0, max_len, *(count * (local_size or 0) for count in (1, 2, 3))]
    queries = sorted({query for border in borders for query in range(border - 2, border + 3) if 0 <= query < max_len})
    for window in candidates:
        if all(_agree(mask_function, window, query) for query in queries):
            return window
    raise ValueError(f"a mask with a window of {local_size} is neither causal, sliding nor chunked")


def _agree(mask_function: Callable[..., Any], window: AttentionWindow, query: int) -> bool:
    """True if both give the token at position `query` the same mask over all positions up to `query + 1`."""
    end = query + 2
    expected: Any = sdpa_mask(
        batch_size=1,
        q_length=1,
        kv_length=end,
        q_offset=query,
        mask_function=mask_function,
        allow_is_causal_skip=False,
    )
    return torch.equal(expected[0, 0], window.mask(torch.tensor([query]), 0, end))

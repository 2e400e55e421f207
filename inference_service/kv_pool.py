"""One pool of key/value memory for all running sequences, which `transformers` models write into and read from.

Models get the pool as their `past_key_values`: each attention layer calls `update` with the keys and values of the new
tokens and gets those of the whole sequence. They are written in place and returned as views, so a sequence enters and
leaves the batch without a copy of the others. Running sequences have the first rows, so that one view covers them. When
one of them finishes, the last running row is copied into its place.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from cache.protocol import ChunkShape
from inference_service.chunk_stage import ChunkStage


class KVPool:
    """Memory for `rows` sequences of up to `max_len` tokens: `[layers, 2, rows, kv_heads, max_len, head_dim]`."""

    is_compileable = False

    def __init__(self, shape: ChunkShape, rows: int, max_len: int, device: torch.device) -> None:
        self.shape = shape
        self.rows = rows
        self.max_len = max_len
        self.device = device
        # Zeros instead of empty memory: a masked position has weight 0, and 0 * NaN would be NaN. For the same reason
        # the values that a sequence leaves behind must be finite: see `is_finite` and `clear`.
        self._memory = torch.zeros(
            (shape.layers, 2, rows, shape.kv_heads, max_len, shape.head_dim), dtype=shape.dtype, device=device
        )
        self._stage = ChunkStage(shape, device) if device.type == "cuda" else None
        self.layers = [None] * shape.layers
        self._prefill: tuple[int, int, int] | None = None
        self._rows = torch.arange(rows, device=device)
        self._positions = torch.zeros(0, dtype=torch.long, device=device)
        self._length = 0

    @property
    def size_bytes(self) -> int:
        return self._memory.numel() * self._memory.element_size()

    # Announce the next forward pass. The model then calls `update` once per layer.

    def begin_prefill(self, row: int, start: int, tokens: int) -> None:
        """The next forward pass computes `tokens` tokens of `row`, from position `start` on."""
        self._prefill = (row, start, start + tokens)

    def begin_decode(self, positions: torch.Tensor, length: int) -> None:
        """The next forward pass computes one token in each of the first rows.

        `positions` `[running]` are those of the tokens; `length` is the greatest of them plus one.
        """
        self._prefill = None
        self._positions = positions
        self._length = length

    # The interface of `past_key_values`.

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens' `[batch, kv_heads, tokens, head_dim]`. Returns views of all tokens so far."""
        if self._prefill is not None:
            row, start, end = self._prefill
            self.write(layer_idx, row, start, key[0], value[0])
            return self.read(layer_idx, row, end)
        self.write_rows(layer_idx, self._positions, key[:, :, 0], value[:, :, 0])
        return self.read_rows(layer_idx, len(self._positions), self._length)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._prefill[1] if self._prefill is not None else self._length - 1

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0

    # Keys and values of one layer.

    def write(self, layer: int, row: int, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write `[kv_heads, tokens, head_dim]` of each to `row`, from position `start` on."""
        end = start + key.shape[1]
        self._memory[layer, 0, row, :, start:end] = key
        self._memory[layer, 1, row, :, start:end] = value

    def write_rows(self, layer: int, positions: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write one token, `[rows, kv_heads, head_dim]` of each, to the first rows, each at its own position."""
        rows = self._rows[: len(positions)]
        self._memory[layer, 0][rows, :, positions] = key
        self._memory[layer, 1][rows, :, positions] = value

    def read(self, layer: int, row: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the first `end` positions of `row`, `[1, kv_heads, end, head_dim]` of each."""
        return self._memory[layer, 0, row : row + 1, :, :end], self._memory[layer, 1, row : row + 1, :, :end]

    def read_rows(self, layer: int, rows: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the first `end` positions of the first `rows` rows, `[rows, kv_heads, end, head_dim]` of each."""
        return self._memory[layer, 0, :rows, :, :end], self._memory[layer, 1, :rows, :, :end]

    # Chunks and rows.

    def load_chunk(self, row: int, index: int, chunk: torch.Tensor) -> None:
        """Copy a chunk (of `shape.size`) to its position in `row`."""
        tokens = self.shape.chunk_tokens
        self._memory[:, :, row, :, index * tokens : (index + 1) * tokens].copy_(chunk, non_blocking=True)

    def read_chunk(self, row: int, index: int, out: torch.Tensor) -> None:
        """Copy chunk `index` of `row` to `out` (of `shape.size`)."""
        tokens = self.shape.chunk_tokens
        out.copy_(self._memory[:, :, row, :, index * tokens : (index + 1) * tokens])

    def load_chunks(self, row: int, chunks: Sequence[torch.Tensor]) -> None:
        """Copy chunks to the beginning of `row`, one after the other. A GPU gets many in one transfer."""
        if self._stage is not None:
            self._stage.load(chunks, partial(self._spans, row))
            return
        for index, chunk in enumerate(chunks):
            self.load_chunk(row, index, chunk)

    def chunk_reader(self, row: int, tokens: int) -> Callable[[int, torch.Tensor], None]:
        """A function like `read_chunk` of `row`, which holds `tokens`.

        Call it with rising indices: a GPU transfers many chunks at once.
        """
        if self._stage is not None:
            return self._stage.reader(tokens // self.shape.chunk_tokens, partial(self._spans, row))
        return partial(self.read_chunk, row)

    def _spans(self, row: int, first: int, count: int) -> torch.Tensor:
        """A view of `count` chunks of `row`, from chunk `first` on: `[count, *shape.size]`."""
        tokens = self.shape.chunk_tokens
        held = self._memory[:, :, row, :, first * tokens : (first + count) * tokens]
        layers, two, heads, _, dim = held.shape
        # Splitting one axis of a strided view in two needs no copy.
        return held.view(layers, two, heads, count, tokens, dim).permute(3, 0, 1, 2, 4, 5)

    def is_finite(self, row: int, start: int, end: int) -> bool:
        """True if all keys and values from position `start` to before `end` of `row` are finite.

        Waits for the device.
        """
        if start >= end:
            return True
        least, greatest = self._memory[:, :, row, :, start:end].aminmax()
        return math.isfinite(least) and math.isfinite(greatest)

    def clear(self, row: int, start: int, end: int) -> None:
        """Write zeros to `row`, from position `start` to before `end`."""
        self._memory[:, :, row, :, start:end] = 0

    def move_row(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` positions of row `source` over row `target`."""
        self._memory[:, :, target, :, :tokens] = self._memory[:, :, source, :, :tokens]

    def swap_rows(self, one: int, one_tokens: int, other: int, other_tokens: int) -> None:
        """Exchange two rows, of which the first `one_tokens` and `other_tokens` positions count."""
        if one_tokens > other_tokens:
            one, one_tokens, other, other_tokens = other, other_tokens, one, one_tokens
        kept = self._memory[:, :, one, :, :one_tokens].clone()
        self.move_row(other, one, other_tokens)
        self._memory[:, :, other, :, :one_tokens] = kept

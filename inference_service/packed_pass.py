"""Pieces of several sequences in one forward pass, one after the other, without padding.

Layers that compute each token by itself (the linear layers, most of the work) then read their weights once for all
sequences. Only attention must separate the sequences: it is computed piece by piece over each sequence's row of the
pool, and together for single tokens of the first rows. (Packed batches of prefill and decode: Orca's selective
batching, OSDI 2022; Sarathi-Serve's hybrid batches, OSDI 2024.)
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from inference_service.active_sequence import Piece
from inference_service.attention_interface import Compute
from inference_service.attention_window import AttentionWindow
from inference_service.kv_pool import KVPool

_NO_LENGTH = 1 << 24
"""A number of tokens above the length of any sequence."""
Masks = tuple[int, torch.Tensor | None]
"""First position of a row that is read, and the mask over the rest. None: each token attends to all up to itself."""


class PackedPass:
    """One pass over `pieces`, of which the first `rows` are single tokens of the pool's first rows.

    The model gets it as `past_key_values`. It writes new keys and values to the pool, layer by layer. The attention
    function, which is called next, reads whole rows from the pool, as far back as the layer's window goes.
    """

    is_compileable = False

    def __init__(
        self,
        pool: KVPool,
        pieces: Sequence[Piece],
        rows: int,
        windows: Sequence[AttentionWindow],
        additive: torch.dtype | None,
    ) -> None:
        """`windows` are those of the layers. `additive`: the type of masks that are added to the scores, as eager
        attention does; None: masks are boolean, as for SDPA.
        """
        device = pool.device
        self._pool = pool
        self._layer = 0
        self.layers = pool.layers
        self.tokens = [token for piece in pieces for token in piece.tokens]
        ends = [0]
        for piece in pieces:
            ends.append(ends[-1] + len(piece.tokens))
        scored = [range(end - piece.logit_rows, end) for piece, end in zip(pieces, ends[1:], strict=True)]
        self.scored_tokens = torch.tensor([place for places in scored for place in places], device=device)
        """`[logit rows]`: places in the pass of the tokens whose logits are needed."""
        positions = [torch.arange(piece.start, piece.end, device=device) for piece in pieces[rows:]]
        self._row_positions = torch.tensor([piece.start for piece in pieces[:rows]], dtype=torch.long, device=device)
        self.positions = torch.cat([self._row_positions, *positions])
        """`[tokens]`: of each token in its sequence."""
        self._rows = rows
        self._row_length = max((piece.end for piece in pieces[:rows]), default=0)
        self._spans = [
            (piece, slice(begin, end))
            for piece, begin, end in zip(pieces[rows:], ends[rows:-1], ends[rows + 1 :], strict=True)
        ]
        self._windows = windows
        self._row_masks: dict[AttentionWindow, Masks] = {}
        self._span_masks: dict[AttentionWindow, list[Masks]] = {}
        for window in dict.fromkeys(windows):
            if rows:
                first = window.first_seen(min(piece.start for piece in pieces[:rows]))
                mask = window.mask(self._row_positions, first, self._row_length)
                self._row_masks[window] = (first, as_given(mask[:, None, None], additive))
            self._span_masks[window] = [
                _span_mask(window, piece, own, additive) for piece, own in zip(pieces[rows:], positions, strict=True)
            ]
        # A mask of four dimensions, so that models make none themselves. The attention function ignores it.
        self.no_mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)

    # The interface of `past_key_values`.

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new `[1, kv_heads, tokens, head_dim]` to their rows; return them unchanged."""
        self._layer = layer_idx
        rows = self._rows
        if rows:
            self._pool.write_rows(
                layer_idx, self._row_positions, key[0, :, :rows].transpose(0, 1), value[0, :, :rows].transpose(0, 1)
            )
        for piece, tokens in self._spans:
            self._pool.write(layer_idx, piece.row, piece.start, key[0, :, tokens], value[0, :, tokens])
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The sequences have no common length, so a model that computes with this one fails the self-test."""
        return _NO_LENGTH

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    # The interface of `AttentionPass`.

    def attend(
        self,
        compute: Compute,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of each token over its row: `[1, heads, tokens, head_dim]` to `[1, tokens, heads, head_dim]`."""
        window = self._windows[self._layer]
        outputs = []
        if self._rows:
            first, row_mask = self._row_masks[window]
            keys, values = self._pool.read_rows(self._layer, self._rows, self._row_length)
            single = query[0, :, : self._rows].transpose(0, 1)[:, :, None]
            output, _ = compute(single, *_from(first, keys, values), row_mask)
            outputs.append(output.transpose(0, 1))
        for (piece, tokens), (first, span_mask) in zip(self._spans, self._span_masks[window], strict=True):
            keys, values = self._pool.read(self._layer, piece.row, piece.end)
            output, _ = compute(query[:, :, tokens], *_from(first, keys, values), span_mask)
            outputs.append(output)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def note_mask(self, mask: torch.Tensor, mask_function: Callable[..., Any], local_size: int | None) -> None:
        """Ignore masks that the model makes in spite of the given one."""


def _from(first: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (keys[:, :, first:], values[:, :, first:]) if first else (keys, values)


def _span_mask(window: AttentionWindow, piece: Piece, positions: torch.Tensor, additive: torch.dtype | None) -> Masks:
    """The mask of a piece. None for a single token, and for a piece that begins its row: SDPA has a faster way then."""
    first = window.first_seen(piece.start)
    causal = first == piece.start == window.first_seen(piece.end - 1)
    if len(piece.tokens) == 1 or (causal and additive is None):
        return first, None
    return first, as_given(window.mask(positions, first, piece.end)[None, None], additive)


def as_given(mask: torch.Tensor, additive: torch.dtype | None) -> torch.Tensor:
    """The boolean mask; with `additive`, that type's 0 where the mask is true and its least number elsewhere."""
    if additive is None:
        return mask
    zeros = torch.zeros(mask.shape, dtype=additive, device=mask.device)
    return zeros.masked_fill_(~mask, torch.finfo(additive).min)

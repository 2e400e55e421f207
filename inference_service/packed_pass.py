"""Pieces of several sequences in one forward pass, one after the other, without padding.

All that a model computes for each token by itself (its linear layers, most of the work) then reads its weights once for
all of them. Attention alone must tell the sequences apart: it is taken piece by piece over each one's own row of the
pool, and for single tokens of the first rows together. (Packed batches of prefill and decode: Orca's selective
batching, OSDI 2022; Sarathi-Serve's hybrid batches, OSDI 2024.)

`transformers` lets a model call an attention function by name. Ours hands each piece to the library's own SDPA.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from inference_service.kv_pool import KVPool
from inference_service.pieces import Piece

ATTENTION = "infertuner_packed"
"""The attention implementation's name; without a packed pass it is SDPA."""


class PackedPass:
    """One pass over `pieces`, of which the first `rows` are single tokens of the pool's first rows.

    It stands where a model expects its `past_key_values`: new keys and values go into the pool, layer by layer, and
    the attention function, which is called next, reads whole rows from there.
    """

    is_compileable = False

    def __init__(self, pool: KVPool, pieces: Sequence[Piece], rows: int) -> None:
        device = pool.device
        self._pool = pool
        self._layer = 0
        self.layers = pool.layers
        self.tokens = [token for piece in pieces for token in piece.tokens]
        ends = [0]
        for piece in pieces:
            ends.append(ends[-1] + len(piece.tokens))
        self.last_tokens = torch.tensor([end - 1 for end in ends[1:]], device=device)
        """`[pieces]`: where in the pass each one's last token stands."""
        positions = [torch.arange(piece.start, piece.end, device=device) for piece in pieces[rows:]]
        self._row_positions = torch.tensor([piece.start for piece in pieces[:rows]], dtype=torch.long, device=device)
        self.positions = torch.cat([self._row_positions, *positions])
        """`[tokens]`: of each token in its sequence."""
        self._rows = rows
        self._row_length = max((piece.end for piece in pieces[:rows]), default=0)
        columns = torch.arange(self._row_length, device=device)
        self._row_mask = (columns[None, :] <= self._row_positions[:, None])[:, None, None]
        self._spans = [
            (piece, slice(begin, end), _causal_mask(piece, own))
            for piece, begin, end, own in zip(pieces[rows:], ends[rows:-1], ends[rows + 1 :], positions, strict=True)
        ]
        # Of four dimensions, so that models make none of their own; the attention function does not look at it.
        self.no_mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)

    # The interface of `past_key_values`.

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new `[1, kv_heads, tokens, head_dim]` to their rows; they come back as they are."""
        self._layer = layer_idx
        rows = self._rows
        if rows:
            self._pool.write_rows(
                layer_idx, self._row_positions, key[0, :, :rows].transpose(0, 1), value[0, :, :rows].transpose(0, 1)
            )
        for piece, tokens, _mask in self._spans:
            self._pool.write(layer_idx, piece.row, piece.start, key[0, :, tokens], value[0, :, tokens])
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    # Attention.

    def attend(self, module: torch.nn.Module, query: torch.Tensor, **options: Any) -> torch.Tensor:
        """Each token over its own row: `[1, heads, tokens, head_dim]` to `[1, tokens, heads, head_dim]`."""
        outputs = []
        if self._rows:
            keys, values = self._pool.read_rows(self._layer, self._rows, self._row_length)
            first = query[0, :, : self._rows].transpose(0, 1)[:, :, None]
            output, _ = sdpa_attention_forward(module, first, keys, values, self._row_mask, **options)
            outputs.append(output.transpose(0, 1))
        for piece, tokens, mask in self._spans:
            keys, values = self._pool.read(self._layer, piece.row, piece.end)
            output, _ = sdpa_attention_forward(module, query[:, :, tokens], keys, values, mask, **options)
            outputs.append(output)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _causal_mask(piece: Piece, positions: torch.Tensor) -> torch.Tensor | None:
    """`[1, 1, tokens, end]`; none where the piece is the beginning of its row: SDPA has a faster way for that."""
    if piece.start == 0:
        return None
    return (torch.arange(piece.end, device=positions.device)[None, :] <= positions[:, None])[None, None]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    *key_value_mask: Any,
    packed_pass: PackedPass | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What a model calls with its query, keys, values and mask. Without a pass of ours it is plain SDPA."""
    if packed_pass is None:
        return sdpa_attention_forward(module, query, *key_value_mask, **options)
    return packed_pass.attend(module, query, **options), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)

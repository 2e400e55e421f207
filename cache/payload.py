"""The payload of a record: the tensor of a chunk, either raw or rounded to eight bits with a scale per slice.

`int8` is symmetric: `code = round(x / scale)` and `x' = code * scale`, with `scale = max |x| / 127` over a slice. Keys
have a scale per channel, because a few of their channels are far larger than the others. Values have no such channels,
and have a scale per token (KIVI, Liu et al., ICML 2024). A slice never reaches beyond its chunk, layer and head.

A decoded chunk encodes to the same bytes again, so a chunk does not drift, however often it is read and written. A
scale has 16 significant bits. Its product with a code of 7 bits is exact in float32, and the greatest product gives
back the scale. A 16-bit dtype rounds a product by at most one 512th, which is a quarter of a scale. Only an error of
half a scale could change a code.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from cache.config import RemoteCodec
from cache.protocol import ChunkShape

Buffer = bytes | bytearray | memoryview

_SCALE_BYTES = 4
_GREATEST_CODE = 127
_LEAST_SCALE = 2.0**-126
"""The smallest normal float32. It avoids divisions by zero, and zeros stay zeros."""
_KEPT_SCALE_BITS = -0x100
"""Mask that clears the last 8 of the 24 significant bits of a float32."""
_REDUCED_AXIS = (2, 3)
"""Axis of `[layers, kv_heads, tokens, head_dim]` that shares a scale: tokens for keys, channels for values."""


class RecordError(Exception):
    """The bytes are not the requested record, but damaged, truncated, foreign or of another version."""


class UnfitChunkError(ValueError):
    """The chunk has values that the codec cannot encode."""


class Payload(Protocol):
    """A layout for chunks of one shape. For one thread only: `memory` may return the same memory each time."""

    size_bytes: int
    """The exact size of every payload."""

    def pack(self, chunk: torch.Tensor) -> memoryview:
        """The payload of a contiguous CPU tensor. It may share the tensor's memory. Raises `UnfitChunkError`."""
        ...

    def memory(self) -> torch.Tensor:
        """A uint8 tensor of `size_bytes` into which a payload can be read."""
        ...

    def unpack(self, memory: torch.Tensor) -> torch.Tensor:
        """The chunk in `memory`. It may be a view. Raises `RecordError` if `pack` cannot have made this payload."""
        ...


class RawPayload:
    """The raw tensor, without a copy in either direction. Refuses values that are not finite."""

    def __init__(self, shape: ChunkShape) -> None:
        self._shape = shape
        self.size_bytes = payload_bytes(shape, RemoteCodec.RAW)

    def pack(self, chunk: torch.Tensor) -> memoryview:
        if not _is_finite(chunk):
            raise UnfitChunkError("the chunk is not finite")
        return payload_view(chunk)

    def memory(self) -> torch.Tensor:
        return torch.empty(self.size_bytes, dtype=torch.uint8)

    def unpack(self, memory: torch.Tensor) -> torch.Tensor:
        chunk = memory.view(self._shape.dtype).view(self._shape.size)
        if not _is_finite(chunk):
            raise RecordError("the chunk is not finite")
        return chunk


class Int8Payload:
    """Scales of the keys `[layers, kv_heads, head_dim]`, of the values `[layers, kv_heads, chunk_tokens]`, both in
    float32, then the codes, one byte each in the order of the chunk. `|x - x'| <= scale / 2`, before x' is rounded to
    the chunk's dtype.
    """

    def __init__(self, shape: ChunkShape) -> None:
        self._shape = shape
        self._scale_sizes = _scale_sizes(shape)
        self._scale_counts = [math.prod(size) for size in self._scale_sizes]
        self._greatest_scale = torch.finfo(shape.dtype).max / _GREATEST_CODE
        self.size_bytes = payload_bytes(shape, RemoteCodec.INT8)
        self._memory = torch.empty(self.size_bytes, dtype=torch.uint8)
        # Reused, because allocating this memory takes longer than the arithmetic.
        self._rescaled = torch.empty((shape.layers, *shape.size[2:]), dtype=torch.float32)

    def pack(self, chunk: torch.Tensor) -> memoryview:
        packed = torch.empty(self.size_bytes, dtype=torch.uint8)
        all_scales, codes = self._parts(packed)
        for part, scales in enumerate(self._by_part(all_scales)):
            exact = chunk[:, part]
            torch.amax(self._rescaled.copy_(exact).abs_(), _REDUCED_AXIS[part], keepdim=True, out=scales)
            scales.div_(_GREATEST_CODE).clamp_(min=_LEAST_SCALE)
            # Rounded down, so that no product of a code and a scale exceeds the range of the dtype.
            scales.view(torch.int32).bitwise_and_(_KEPT_SCALE_BITS)
            codes[:, part] = torch.div(exact, scales, out=self._rescaled).round_()
        if not bool(all_scales.isfinite().all()):
            raise UnfitChunkError("the chunk is not finite")
        return payload_view(packed)

    def memory(self) -> torch.Tensor:
        return self._memory

    def unpack(self, memory: torch.Tensor) -> torch.Tensor:
        all_scales, codes = self._parts(memory)
        least, greatest = torch.aminmax(all_scales)
        # Also false for NaN: both results are NaN if any scale is.
        if not (least.item() > 0 and greatest.item() <= self._greatest_scale):
            raise RecordError("a scale is not a positive number of the chunk's dtype")
        if codes.amin().item() < -_GREATEST_CODE:
            raise RecordError("a code is out of range")
        chunk = torch.empty(self._shape.size, dtype=self._shape.dtype)
        for part, scales in enumerate(self._by_part(all_scales)):
            torch.mul(codes[:, part], scales, out=chunk[:, part])
        return chunk

    def _parts(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All scales, `[count]`, and the codes, in the shape of the chunk. Both are views of `memory`."""
        end = _SCALE_BYTES * sum(self._scale_counts)
        return memory[:end].view(torch.float32), memory[end:].view(torch.int8).view(self._shape.size)

    def _by_part(self, scales: torch.Tensor) -> Sequence[torch.Tensor]:
        """The scales of the keys and those of the values, in shapes that broadcast over their parts of a chunk."""
        keys = self._scale_counts[0]
        parts = scales[:keys], scales[keys:]
        return [part.view(size) for part, size in zip(parts, self._scale_sizes, strict=True)]


def payload_bytes(shape: ChunkShape, codec: RemoteCodec) -> int:
    """The exact size of the payload of a chunk of `shape`."""
    if codec is RemoteCodec.RAW:
        return shape.size_bytes
    return math.prod(shape.size) + _SCALE_BYTES * sum(map(math.prod, _scale_sizes(shape)))


def make_payload(codec: RemoteCodec, shape: ChunkShape) -> Payload:
    """The payloads of `codec` for chunks of `shape`."""
    return Int8Payload(shape) if codec is RemoteCodec.INT8 else RawPayload(shape)


def _scale_sizes(shape: ChunkShape) -> Sequence[tuple[int, int, int, int]]:
    """Shapes of the scales of keys and values, with size 1 on the axis that shares a scale."""
    layers, _, heads, tokens, dim = shape.size
    return (layers, heads, 1, dim), (layers, heads, tokens, 1)


def _is_finite(chunk: torch.Tensor) -> bool:
    """True if the chunk holds neither NaN nor infinity, in one pass over it."""
    least, greatest = torch.aminmax(chunk)
    # Both are NaN if any value is.
    return math.isfinite(least.item()) and math.isfinite(greatest.item())


def payload_view(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as writable bytes, without a copy."""
    data: memoryview = tensor.detach().view(-1).view(torch.uint8).numpy().data
    return data

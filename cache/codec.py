"""The record of a chunk in Redis: a header of 128 bytes, then the payload (`cache.payload`).

| offset | bytes | field                                                        |
|--------|-------|--------------------------------------------------------------|
| 0      | 8     | magic                                                        |
| 8      | 2     | version                                                      |
| 10     | 1     | dtype code                                                   |
| 11     | 1     | number of dimensions                                         |
| 12     | 4     | header length                                                |
| 16     | 8     | payload length                                               |
| 24     | 20    | the five dimensions, u32 each                                |
| 44     | 32    | fingerprint: `h0` of model, layout, codec, seal and tenant   |
| 76     | 32    | the chunk's own hash                                         |
| 108    | 1     | codec of the payload: 0 raw, 1 int8                          |
| 109    | 3     | zero                                                         |
| 112    | 16    | seal of the 112 bytes before and of the payload: xxh3-128,   |
|        |       | or HMAC-SHA256-128 if the job has a key (`cache.seal`)       |

All numbers are little-endian. The reader knows which chunk it asked for, so each field has exactly one valid value. No
field decides how much memory is allocated. Payloads are compared and moved as bytes.
"""

import hmac
import struct

import torch

from cache.config import RemoteCodec
from cache.payload import Buffer, RecordError, make_payload, payload_bytes
from cache.protocol import ChunkShape
from cache.seal import CHECKSUM, Seal

MAGIC = b"INFTKVC\x00"
VERSION = 1
HEADER_BYTES = 128
"""A multiple of 64, so that the payload of an aligned record is aligned too."""

_FIELDS = struct.Struct("<8sHBBIQ5I32s32sB3x")
_DTYPE_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_CODEC_CODES = {RemoteCodec.RAW: 0, RemoteCodec.INT8: 1}


def record_bytes(shape: ChunkShape, codec: RemoteCodec = RemoteCodec.RAW) -> int:
    """The exact size of a chunk's record."""
    return HEADER_BYTES + payload_bytes(shape, codec)


def encode_header(
    shape: ChunkShape,
    fingerprint: bytes,
    chunk_hash: bytes,
    payload: Buffer,
    codec: RemoteCodec = RemoteCodec.RAW,
    *,
    seal: Seal = CHECKSUM,
) -> bytes:
    """The header for `payload`, which `codec` made from a chunk of `shape`."""
    fields = _expected_fields(shape, fingerprint, chunk_hash, codec)
    return fields + seal.of(fields, payload)


def check_header(
    header: Buffer, shape: ChunkShape, fingerprint: bytes, chunk_hash: bytes, codec: RemoteCodec = RemoteCodec.RAW
) -> None:
    """Raise `RecordError` with the name of the field unless `header` is that of the requested chunk."""
    if len(header) != HEADER_BYTES:
        raise RecordError(f"header of {len(header)} bytes")
    fields = bytes(header[: _FIELDS.size])
    expected = _expected_fields(shape, fingerprint, chunk_hash, codec)
    if fields != expected:
        raise RecordError(f"{_first_difference(fields, expected)} is not what was asked for")


def check_payload(header: Buffer, payload: Buffer, seal: Seal = CHECKSUM) -> None:
    """Raise `RecordError` unless the seal in `header` matches header and `payload`."""
    # In constant time, so that timing does not reveal how much of a forged seal is right.
    if not hmac.compare_digest(seal.of(header[: _FIELDS.size], payload), bytes(header[_FIELDS.size :])):
        raise RecordError("checksum does not match" if seal.key_name is None else "it was not made with our key")


def encode(
    chunk: torch.Tensor,
    shape: ChunkShape,
    fingerprint: bytes,
    chunk_hash: bytes,
    codec: RemoteCodec = RemoteCodec.RAW,
    *,
    seal: Seal = CHECKSUM,
) -> bytes:
    """The whole record of `chunk` (contiguous, of `shape`, on the CPU) as one byte string. Copies the payload.

    Raises `UnfitChunkError` for a chunk that `codec` cannot hold.
    """
    payload = make_payload(codec, shape).pack(chunk)
    return b"".join((encode_header(shape, fingerprint, chunk_hash, payload, codec, seal=seal), payload))


def decode(
    record: Buffer,
    shape: ChunkShape,
    fingerprint: bytes,
    chunk_hash: bytes,
    codec: RemoteCodec = RemoteCodec.RAW,
    *,
    seal: Seal = CHECKSUM,
) -> torch.Tensor:
    """The tensor of `shape` in `record`. For the raw codec it is a view of `record`.

    A view of `bytes` must not be written to. Raises `RecordError` for any other chunk.
    """
    if len(record) != record_bytes(shape, codec):
        raise RecordError(f"record of {len(record)} bytes instead of {record_bytes(shape, codec)}")
    view = memoryview(record)
    header, payload = view[:HEADER_BYTES], view[HEADER_BYTES:]
    check_header(header, shape, fingerprint, chunk_hash, codec)
    check_payload(header, payload, seal)
    return make_payload(codec, shape).unpack(torch.frombuffer(record, dtype=torch.uint8, offset=HEADER_BYTES))


def _expected_fields(shape: ChunkShape, fingerprint: bytes, chunk_hash: bytes, codec: RemoteCodec) -> bytes:
    return _FIELDS.pack(
        MAGIC,
        VERSION,
        _DTYPE_CODES[shape.dtype],
        len(shape.size),
        HEADER_BYTES,
        payload_bytes(shape, codec),
        *shape.size,
        fingerprint,
        chunk_hash,
        _CODEC_CODES[codec],
    )


def _first_difference(fields: bytes, expected: bytes) -> str:
    names = (
        (8, "magic"),
        (10, "version"),
        (11, "dtype"),
        (12, "number of dimensions"),
        (16, "header length"),
        (24, "payload length"),
        (44, "shape"),
        (76, "fingerprint"),
        (108, "chunk hash"),
        (109, "codec"),
    )
    position = next(i for i, (got, want) in enumerate(zip(fields, expected, strict=True)) if got != want)
    return next((name for end, name in names if position < end), "padding")

"""The codec: a record gives back its chunk, and every damaged record is refused."""

import math
from dataclasses import replace

import pytest
import torch
from cache_support import SHAPE, finite, given, same_bits
from hypothesis import strategies as st

from cache.codec import HEADER_BYTES, RecordError, decode, encode, encode_header, record_bytes
from cache.payload import UnfitChunkError, payload_view
from cache.protocol import ChunkShape

FINGERPRINT, HASH = bytes(range(32)), bytes(range(32, 64))
shapes = st.builds(
    ChunkShape,
    layers=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    chunk_tokens=st.integers(1, 5),
    head_dim=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)


def of_bytes(data: bytes, shape: ChunkShape) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=shape.dtype).view(shape.size)


@given(shapes, st.data())
def test_round_trip_is_bit_exact_whatever_the_finite_bits(shape, data):
    chunk = finite(of_bytes(data.draw(st.binary(min_size=shape.size_bytes, max_size=shape.size_bytes)), shape))
    record = encode(chunk, shape, FINGERPRINT, HASH)
    assert len(record) == record_bytes(shape)
    assert same_bits(decode(bytearray(record), shape, FINGERPRINT, HASH), chunk)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@given(position=st.integers(0, math.prod(SHAPE.size) - 1))
def test_values_that_are_not_finite_are_neither_written_nor_read(dtype, bad, position):
    shape = replace(SHAPE, dtype=dtype)
    chunk = torch.ones(shape.size, dtype=dtype)
    chunk.view(-1)[position] = bad
    with pytest.raises(UnfitChunkError):
        encode(chunk, shape, FINGERPRINT, HASH)
    payload = bytes(payload_view(chunk))
    record = encode_header(shape, FINGERPRINT, HASH, payload) + payload
    with pytest.raises(RecordError, match="not finite"):
        decode(bytearray(record), shape, FINGERPRINT, HASH)


def test_decoding_copies_nothing():
    record = bytearray(encode(torch.zeros(SHAPE.size), SHAPE, FINGERPRINT, HASH))
    chunk = decode(record, SHAPE, FINGERPRINT, HASH)
    record[HEADER_BYTES : HEADER_BYTES + 4] = b"\x00\x00\x80\x3f"
    assert chunk.view(-1)[0] == 1.0


RECORD = encode(finite(of_bytes(bytes(i % 251 for i in range(SHAPE.size_bytes)), SHAPE)), SHAPE, FINGERPRINT, HASH)


@pytest.mark.parametrize("position", range(HEADER_BYTES))
def test_a_flipped_bit_in_any_header_byte_is_refused(position):
    for bit in range(8):
        damaged = bytearray(RECORD)
        damaged[position] ^= 1 << bit
        with pytest.raises(RecordError):
            decode(damaged, SHAPE, FINGERPRINT, HASH)


@given(st.integers(HEADER_BYTES, len(RECORD) - 1), st.integers(0, 7))
def test_a_flipped_bit_in_the_payload_is_refused(position, bit):
    damaged = bytearray(RECORD)
    damaged[position] ^= 1 << bit
    with pytest.raises(RecordError, match="checksum"):
        decode(damaged, SHAPE, FINGERPRINT, HASH)


@pytest.mark.parametrize("length", [*range(HEADER_BYTES + 2), len(RECORD) - 1, len(RECORD) + 1, 2 * len(RECORD)])
def test_another_length_is_refused(length):
    with pytest.raises(RecordError):
        decode(bytearray((RECORD * 2)[:length]), SHAPE, FINGERPRINT, HASH)


@given(st.binary(min_size=len(RECORD), max_size=len(RECORD)))
def test_arbitrary_bytes_are_refused(data):
    with pytest.raises(RecordError):
        decode(bytearray(data), SHAPE, FINGERPRINT, HASH)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ((replace(SHAPE, layers=1, kv_heads=2), FINGERPRINT, HASH), "shape"),
        ((replace(SHAPE, dtype=torch.bfloat16, head_dim=8), FINGERPRINT, HASH), "dtype"),
        ((SHAPE, HASH, HASH), "fingerprint"),
        ((SHAPE, FINGERPRINT, FINGERPRINT), "chunk hash"),
    ],
)
def test_a_sound_record_of_another_chunk_is_refused_by_name(asked, named):
    with pytest.raises(RecordError, match=named):
        decode(bytearray(RECORD), *asked)


def test_another_version_is_refused_even_with_its_own_right_checksum(monkeypatch):
    monkeypatch.setattr("cache.codec.VERSION", 2)
    newer = encode(torch.zeros(SHAPE.size), SHAPE, FINGERPRINT, HASH)
    monkeypatch.undo()
    with pytest.raises(RecordError, match="version"):
        decode(bytearray(newer), SHAPE, FINGERPRINT, HASH)

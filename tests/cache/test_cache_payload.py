"""The int8 payload: its error, no drift when encoded again, and its refusals when encoding and decoding."""

import math
from dataclasses import replace

import pytest
import torch
from cache_support import SHAPE, given, same_bits
from hypothesis import strategies as st
from test_cache_codec import FINGERPRINT, HASH, of_bytes, shapes

from cache.codec import HEADER_BYTES, RecordError, decode, encode, encode_header, record_bytes
from cache.config import RemoteCodec
from cache.payload import Int8Payload, UnfitChunkError

INT8 = RemoteCodec.INT8
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def through(chunk: torch.Tensor, shape) -> tuple[torch.Tensor, bytes]:
    """Encode and decode `chunk`; return the result and the record."""
    record = encode(chunk, shape, FINGERPRINT, HASH, INT8)
    return decode(bytearray(record), shape, FINGERPRINT, HASH, INT8), record


def scales_of(record: bytes, shape) -> torch.Tensor:
    """The scale of every element, in the chunk's shape."""
    layers, _, heads, tokens, dim = shape.size
    scales = torch.frombuffer(bytearray(record), dtype=torch.float32, offset=HEADER_BYTES, count=layers * heads * dim)
    keys = scales.view(layers, heads, 1, dim).expand(layers, heads, tokens, dim)
    offset = HEADER_BYTES + 4 * layers * heads * dim
    scales = torch.frombuffer(bytearray(record), dtype=torch.float32, offset=offset, count=layers * heads * tokens)
    values = scales.view(layers, heads, tokens, 1).expand(layers, heads, tokens, dim)
    return torch.stack([keys, values], dim=1)


def any_finite(data, shape) -> torch.Tensor:
    """Any finite numbers: subnormal, huge, of both signs."""
    chunk = of_bytes(data.draw(st.binary(min_size=shape.size_bytes, max_size=shape.size_bytes)), shape)
    return torch.where(chunk.isfinite(), chunk, torch.zeros_like(chunk))


def ordinary(data, shape) -> torch.Tensor:
    """Normally distributed numbers; each channel and token has its own magnitude."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    layers, two, heads, tokens, dim = shape.size
    chunk = torch.randn(shape.size, generator=generator)
    chunk *= torch.randn((layers, two, heads, 1, dim), generator=generator).exp()
    chunk *= torch.randn((layers, two, heads, tokens, 1), generator=generator).exp()
    return chunk.to(shape.dtype)


chunks = st.sampled_from([any_finite, ordinary])


@given(shapes, chunks, st.data())
def test_no_element_is_off_by_more_than_half_its_scale(shape, make, data):
    chunk = make(data, shape)
    back, record = through(chunk, shape)
    assert back.dtype == shape.dtype
    exact = chunk.double()
    # Beyond that, only the rounding of the quotient, and of the product to the chunk's dtype.
    dtype = torch.finfo(shape.dtype)
    rounding = exact.abs() * dtype.eps + dtype.smallest_normal * dtype.eps
    assert ((back.double() - exact).abs() <= scales_of(record, shape).double() / 2 + rounding).all()


@given(shapes, chunks, st.data())
def test_what_was_decoded_encodes_to_the_same_record(shape, make, data):
    once, record = through(make(data, shape), shape)
    again, second = through(once, shape)
    assert second == record
    assert same_bits(again, once)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_greatest_numbers_stay_finite_and_zeros_stay_zeros(dtype):
    shape = replace(SHAPE, dtype=dtype)
    chunk = torch.zeros(shape.size, dtype=dtype)
    chunk[0] = torch.finfo(dtype).max
    chunk[0, :, :, 1::2] *= -1
    back, record = through(chunk, shape)
    assert back.isfinite().all()
    assert torch.allclose(back[0].double(), chunk[0].double(), rtol=1e-2)
    assert (back[1] == 0).all()
    assert through(back, shape)[1] == record


def test_a_key_has_a_scale_for_its_channel_and_a_value_for_its_token():
    chunk = torch.ones(SHAPE.size)
    chunk[:, 0, :, :, 2] = 1000.0
    chunk[:, 1, :, 3] = 1000.0
    # Numbers that share no scale with the large ones are as exact as without them.
    assert torch.allclose(through(chunk, SHAPE)[0], chunk, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_size_is_a_byte_an_element_and_the_scales(dtype):
    shape = replace(SHAPE, layers=8, kv_heads=2, chunk_tokens=32, head_dim=64, dtype=dtype)
    scales = 8 * 2 * (64 + 32)
    assert record_bytes(shape, INT8) == HEADER_BYTES + math.prod(shape.size) + 4 * scales
    assert len(encode(torch.zeros(shape.size, dtype=dtype), shape, FINGERPRINT, HASH, INT8)) == record_bytes(
        shape, INT8
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@given(position=st.integers(0, math.prod(SHAPE.size) - 1))
def test_a_chunk_that_is_not_finite_is_refused(dtype, bad, position):
    shape = replace(SHAPE, dtype=dtype)
    chunk = torch.ones(shape.size, dtype=dtype)
    chunk.view(-1)[position] = bad
    with pytest.raises(UnfitChunkError):
        encode(chunk, shape, FINGERPRINT, HASH, INT8)


RECORD = encode(torch.arange(1.0, 65.0).view(SHAPE.size), SHAPE, FINGERPRINT, HASH, INT8)


@pytest.mark.parametrize("position", range(len(RECORD)))
def test_a_flipped_bit_in_any_byte_is_refused(position):
    for bit in range(8):
        damaged = bytearray(RECORD)
        damaged[position] ^= 1 << bit
        with pytest.raises(RecordError):
            decode(damaged, SHAPE, FINGERPRINT, HASH, INT8)


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES, len(RECORD) - 1, len(RECORD) + 1, record_bytes(SHAPE)])
def test_another_length_is_refused(length):
    with pytest.raises(RecordError):
        decode(bytearray((RECORD * 2)[:length]), SHAPE, FINGERPRINT, HASH, INT8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, -1.0, 0.0, -0.0, "too great"])
@pytest.mark.parametrize("index", range(2 * 1 * (4 + 4)))
def test_a_scale_that_none_is_made_with_is_refused_under_a_right_checksum(dtype, scale, index):
    shape = replace(SHAPE, dtype=dtype)
    payload = torch.frombuffer(
        bytearray(encode(torch.ones(shape.size, dtype=dtype), shape, b"", b"", INT8)), dtype=torch.uint8
    )
    payload = payload[HEADER_BYTES:].clone()
    payload[: 4 * 16].view(torch.float32)[index] = torch.finfo(dtype).max / 100 if scale == "too great" else scale
    data = payload.numpy().tobytes()
    record = encode_header(shape, FINGERPRINT, HASH, data, INT8) + data
    with pytest.raises(RecordError, match="scale"):
        decode(bytearray(record), shape, FINGERPRINT, HASH, INT8)


@pytest.mark.parametrize("index", [0, math.prod(SHAPE.size) - 1])
def test_a_code_that_none_is_made_with_is_refused_under_a_right_checksum(index):
    """The product of the code and the greatest scale would not be finite."""
    payload = bytearray(encode(torch.full(SHAPE.size, 3e38), SHAPE, b"", b"", INT8)[HEADER_BYTES:])
    payload[len(payload) - math.prod(SHAPE.size) + index] = 0x80
    record = encode_header(SHAPE, FINGERPRINT, HASH, bytes(payload), INT8) + payload
    with pytest.raises(RecordError, match="code"):
        decode(bytearray(record), SHAPE, FINGERPRINT, HASH, INT8)


@pytest.mark.parametrize("codecs", [(RemoteCodec.RAW, INT8), (INT8, RemoteCodec.RAW)])
def test_a_record_of_the_other_codec_is_refused_whatever_its_size(codecs):
    written, asked = codecs
    # One float32 per channel and one byte per element: here both codecs take equally many bytes.
    same_size = replace(SHAPE, chunk_tokens=4, head_dim=4, dtype=torch.bfloat16)
    assert record_bytes(same_size, INT8) == record_bytes(same_size)
    for shape in (SHAPE, same_size):
        record = encode(torch.ones(shape.size, dtype=shape.dtype), shape, FINGERPRINT, HASH, written)
        with pytest.raises(RecordError, match="codec" if shape is same_size else "bytes instead"):
            decode(bytearray(record), shape, FINGERPRINT, HASH, asked)


def test_a_chunk_outlives_the_next_one_in_the_same_memory():
    payload = Int8Payload(SHAPE)
    memory = payload.memory()
    kept = []
    for value in (1.0, 2.0):
        memory.numpy()[:] = payload.pack(torch.full(SHAPE.size, value))
        kept.append(payload.unpack(memory))
    assert (kept[0] == kept[0].view(-1)[0]).all()
    assert torch.allclose(kept[0], torch.ones(SHAPE.size), rtol=1e-4)

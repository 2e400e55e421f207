"""Int8 chunks through a cache on a real Redis: results, separation from raw chunks, no drift."""

import hashlib
import math
from dataclasses import replace

import pytest
import torch
from cache_support import IDENTITY, SHAPE, hits, prompt, store

from cache.codec import HEADER_BYTES, decode, encode, encode_header, record_bytes
from cache.config import RemoteCodec
from cache.keys import KeySchema
from core.clock import ManualClock

N = 5
TOKENS = prompt(N)
INT8, RAW = RemoteCodec.INT8, RemoteCodec.RAW
RECORD_BYTES = record_bytes(SHAPE, INT8)


def keys_of(codec: RemoteCodec, shape=SHAPE) -> list[str]:
    return [f"infertuner:{chunk_hash.hex()}" for chunk_hash in KeySchema(IDENTITY, shape, codec).of(TOKENS).hashes]


KEYS = keys_of(INT8)


def number_chunk(index: int, shape=SHAPE) -> torch.Tensor:
    """The only right tensor of chunk `index` of TOKENS, with numbers like a model's."""
    generator = torch.Generator().manual_seed(index)
    return torch.randn(shape.size, generator=generator).to(shape.dtype)


def store_numbers(cache, bad_at: int | None = None) -> None:
    def read_chunk(index: int, out: torch.Tensor) -> None:
        out.copy_(number_chunk(index, cache.shape))
        if index == bad_at:
            out[0, 0, 0, 0, 0] = math.nan

    cache.store(TOKENS, read_chunk)
    assert cache.flush(10)


def found(cache) -> int:
    """Return the number of chunks of TOKENS from Redis; check that each is close to the right one and to no other."""
    with cache.fetch_and_lookup(TOKENS) as prefix:
        for index, chunk in enumerate(prefix.chunks):
            assert torch.allclose(chunk, number_chunk(index, cache.shape), atol=0.03)
        return prefix.remote_chunks


@pytest.fixture
def int8(redis_server, client, caches):
    """Makes int8 caches on an empty Redis."""
    return lambda **settings: caches(redis_server.url, remote_codec=INT8, **settings)


@pytest.fixture
def filled(int8):
    """Redis has all chunks of TOKENS, written by another cache."""
    writer = int8()
    store_numbers(writer)
    assert writer.stats().bytes_written == N * RECORD_BYTES


class TestKeeping:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_another_process_finds_all(self, int8, dtype):
        shape = replace(SHAPE, dtype=dtype)
        store_numbers(int8(shape=shape))
        cache = int8(shape=shape)
        assert found(cache) == N
        assert cache.stats().bytes_read == N * RECORD_BYTES

    def test_records_are_as_long_as_announced(self, filled, client):
        assert [client.strlen(key) for key in KEYS] == [RECORD_BYTES] * N

    def test_the_local_tier_keeps_what_was_computed_as_it_is(self, int8):
        cache = int8()
        store_numbers(cache)
        with cache.fetch_and_lookup(TOKENS) as prefix:
            assert prefix.local_chunks == N
            assert all(torch.equal(chunk, number_chunk(index)) for index, chunk in enumerate(prefix.chunks))

    def test_the_predicted_transfer_is_of_the_bytes_that_move(self, redis_server, filled, int8, caches):
        """At one millisecond per byte, int8 records arrive before the prefill would end, and raw ones after."""
        store(writer := caches(redis_server.url), TOKENS)
        assert writer.flush(10)
        between = (RECORD_BYTES + record_bytes(SHAPE)) / 2 / SHAPE.chunk_tokens
        for cache, wanted in ((int8(), N), (caches(redis_server.url), 0)):
            cache._remote._plan.round_trip_ms = 0.0
            cache._remote._plan.ms_per_byte = 1.0
            with cache.fetch_and_lookup(TOKENS, prefill_ms_per_token=between) as prefix:
                assert prefix.remote_chunks == wanted


class TestDrift:
    def test_what_came_from_redis_is_not_written_back(self, filled, int8):
        cache = int8()
        assert found(cache) == N
        store_numbers(cache)
        assert cache.stats().bytes_written == 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_what_is_written_afresh_is_what_was_read(self, int8, client, dtype):
        """Halfway to expiry, chunks in use are written again, from the tensors that came from Redis."""
        shape = replace(SHAPE, dtype=dtype)
        keys = keys_of(INT8, shape)
        store_numbers(int8(shape=shape))
        first = client.mget(keys)
        for _ in range(3):
            clock = ManualClock()
            cache = int8(shape=shape, clock=clock)
            assert found(cache) == N
            client.flushall()
            clock.advance(1800_000)
            cache.store(TOKENS, lambda index, out: pytest.fail("the local tier has it"))
            assert cache.flush(10)
            assert client.mget(keys) == first

    def test_without_local_room_too(self, filled, int8, client):
        """The local tier keeps nothing, so chunks that Redis has lost are stored again from the engine's row."""
        first = client.mget(KEYS)
        cache = int8(capacity=0)
        with cache.fetch_and_lookup(TOKENS) as prefix:
            rows = [chunk.clone() for chunk in prefix.chunks]
        client.flushall()
        assert found(cache) == 0
        cache.store(TOKENS, lambda index, out: out.copy_(rows[index]))
        assert cache.flush(10)
        assert client.mget(KEYS) == first


class TestMixing:
    def test_the_codecs_share_no_key(self):
        assert set(KEYS).isdisjoint(keys_of(RAW))
        assert keys_of(RAW) == [f"infertuner:{h.hex()}" for h in KeySchema(IDENTITY, SHAPE).of(TOKENS).hashes]

    def test_on_one_redis_each_finds_its_own_alone(self, redis_server, filled, int8, caches, client):
        raw = caches(redis_server.url)
        assert hits(raw, TOKENS) == (0, 0)
        store(raw, TOKENS)
        assert raw.flush(10)
        assert client.dbsize() == 2 * N
        assert hits(another := caches(redis_server.url), TOKENS) == (0, N)
        assert found(cache := int8()) == N
        assert (another.stats().remote_corrupt, cache.stats().remote_corrupt) == (0, 0)

    @pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, dtype=torch.bfloat16)])
    @pytest.mark.parametrize("codecs", [(INT8, RAW), (RAW, INT8)])
    def test_a_record_of_the_other_codec_under_the_key_is_a_miss(self, redis_server, client, caches, codecs, shape):
        """Records of bfloat16 are equally long with both codecs."""
        written, asked = codecs
        schema = KeySchema(IDENTITY, shape, asked)
        keys = schema.of(TOKENS)
        for index, (key, chunk_hash) in enumerate(zip(keys_of(asked, shape), keys.hashes, strict=True)):
            client.set(key, encode(number_chunk(index, shape), shape, keys.fingerprint, chunk_hash, written))
        cache = caches(redis_server.url, shape=shape, remote_codec=asked)
        with cache.fetch_and_lookup(TOKENS) as prefix:
            assert len(prefix.chunks) == 0
        assert cache.stats().remote_corrupt >= 1
        assert cache.flush(10)
        assert not client.exists(keys_of(asked, shape)[0])


class TestDamage:
    @pytest.mark.parametrize("position", range(RECORD_BYTES))
    def test_a_flipped_bit_is_a_miss_and_the_key_is_deleted(self, filled, int8, client, position):
        byte = client.getrange(KEYS[2], position, position)[0]
        client.setrange(KEYS[2], position, bytes([byte ^ 0x10]))
        cache = int8()
        assert found(cache) == 2
        assert cache.stats().remote_corrupt == 1
        assert cache.flush(10)
        assert not client.exists(KEYS[2])

    @pytest.mark.parametrize("length", [1, HEADER_BYTES, RECORD_BYTES - 1, RECORD_BYTES + 1, record_bytes(SHAPE)])
    def test_another_length_is_a_miss(self, filled, int8, client, length):
        client.set(KEYS[2], (client.get(KEYS[2]) * 2)[:length])
        cache = int8()
        assert found(cache) == 2
        assert cache.stats().remote_corrupt == 1

    @pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0, 0.0])
    def test_a_bad_scale_under_a_right_checksum_is_a_miss(self, filled, int8, client, scale):
        keys = KeySchema(IDENTITY, SHAPE, INT8).of(TOKENS)
        payload = torch.frombuffer(bytearray(client.get(KEYS[2])[HEADER_BYTES:]), dtype=torch.uint8)
        payload[:4].view(torch.float32)[0] = scale
        data = payload.numpy().tobytes()
        client.set(KEYS[2], encode_header(SHAPE, keys.fingerprint, keys.hashes[2], data, INT8) + data)
        cache = int8()
        assert found(cache) == 2
        assert cache.stats().remote_corrupt == 1

    @pytest.mark.parametrize("capacity", [0, 8])
    def test_a_chunk_that_is_not_finite_is_not_stored_and_counted(self, int8, client, capacity):
        cache = int8(capacity=capacity)
        store_numbers(cache, bad_at=2)
        stats = cache.stats()
        assert (stats.write_unfit, stats.write_dropped, stats.remote_errors) == (1, 1, 0)
        assert stats.bytes_written == (N - 1) * RECORD_BYTES
        assert stats.queued_bytes == 0
        assert sorted(key.decode() for key in client.scan_iter()) == sorted(KEYS[:2] + KEYS[3:])
        assert found(int8()) == 2

    def test_a_raw_cache_does_not_store_it_either(self, redis_server, client, caches):
        cache = caches(redis_server.url)
        store_numbers(cache, bad_at=2)
        assert (cache.stats().write_unfit, client.dbsize()) == (1, N - 1)


def test_records_of_raw_are_what_they_were_before_there_were_codecs():
    """The digests of record and key are those of the release before codecs."""
    chunk = torch.arange(64.0).view(SHAPE.size)
    record = encode(chunk, SHAPE, bytes(range(32)), bytes(range(32, 64)))
    assert torch.equal(decode(bytearray(record), SHAPE, bytes(range(32)), bytes(range(32, 64))), chunk)
    assert hashlib.sha256(record).hexdigest() == "f3b3d3020bbd91b8faa1b1389727b2648c1ab279c765bf894eea7db3abaf1345"
    assert (
        KeySchema(IDENTITY, SHAPE).fingerprint().hex()
        == "c35a0e879cd59ea9783bda712a35d096e7540947cc9e4aecde5ac9a9934dbc47"
    )

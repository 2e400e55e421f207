"""The remote tier through a cache on a real Redis: what it keeps, and every fault, each of which is a miss."""

import socket
import time
from dataclasses import replace

import pytest
import redis
import torch
from cache_support import (
    IDENTITY,
    SHAPE,
    Proxy,
    RedisServer,
    check_prefix,
    free_port,
    hits,
    make_cache,
    prompt,
    reader,
    store,
)

from cache.codec import HEADER_BYTES, record_bytes
from cache.config import CacheConfig, RemoteConfig
from cache.keys import KeySchema
from cache.redis_wire import RedisConnection
from core.clock import ManualClock
from core.errors import UserError
from operators.config import JobConfig
from operators.slots.check import check_before_start

N = 5
TOKENS = prompt(N)
KEYS = [f"infertuner:{h.hex()}" for h in KeySchema(IDENTITY, SHAPE).of(TOKENS).hashes]


def keys_in(client) -> list[str]:
    return sorted(key.decode() for key in client.scan_iter())


@pytest.fixture
def filled(redis_server, client):
    """Redis has all chunks of TOKENS, written by another cache."""
    writer = make_cache(redis_server.url)
    store(writer, TOKENS)
    assert writer.flush(10)
    assert writer.stats().bytes_written == N * record_bytes(SHAPE)
    writer.close()
    assert client.dbsize() == N


class TestKeeping:
    def test_another_process_finds_all_and_keeps_it(self, redis_server, filled, caches):
        cache = caches(redis_server.url)
        assert hits(cache, TOKENS) == (0, N)
        assert cache.stats().bytes_read == N * record_bytes(SHAPE)
        assert hits(cache, TOKENS) == (N, 0)

    def test_every_key_has_its_time_to_live(self, filled, client):
        assert all(3500 < client.ttl(key) <= 3600 for key in KEYS)

    def test_promotes_the_first_chunks_where_not_all_fit(self, redis_server, filled, caches):
        cache = caches(redis_server.url, capacity=2)
        with cache.fetch_and_lookup(TOKENS) as prefix:
            check_prefix(prefix, TOKENS, "")
            assert prefix.remote_chunks == N
            stats = cache.stats()
            assert (stats.used_chunks, stats.pinned_outside_bytes) == (2, (N - 2) * SHAPE.size_bytes)
            assert set(cache._local) == {bytes.fromhex(key.split(":")[1]) for key in KEYS[:2]}
        assert cache.stats().pinned_outside_bytes == 0
        assert hits(cache, TOKENS) == (2, N - 2)

    def test_what_finds_no_room_goes_to_redis_alone(self, redis_server, client, caches):
        cache = caches(redis_server.url, capacity=2)
        assert store(cache, TOKENS) == N
        assert cache.flush(10)
        assert client.dbsize() == N
        assert hits(cache, TOKENS) == (2, N - 2)

    def test_a_local_chunk_behind_a_gap_that_redis_fills_is_local(self, redis_server, filled, caches):
        cache = caches(redis_server.url)
        assert hits(cache, TOKENS) == (0, N)
        gap = bytes.fromhex(KEYS[1].split(":")[1])
        cache._local._eviction.on_remove(gap)
        del cache._local._entries[gap]
        with cache.fetch_and_lookup(TOKENS) as prefix:
            check_prefix(prefix, TOKENS, "")
            assert list(prefix.tiers) == ["local", "remote", "local", "local", "local"]

    def test_another_salt_or_model_finds_nothing(self, redis_server, filled, caches):
        assert hits(caches(redis_server.url), TOKENS, "other") == (0, 0)
        assert hits(caches(redis_server.url, identity=replace(IDENTITY, adapter="lora")), TOKENS) == (0, 0)

    def test_a_chunk_is_written_once(self, redis_server, filled, client, caches):
        cache = caches(redis_server.url)
        hits(cache, TOKENS)
        store(cache, TOKENS)
        assert cache.flush(10)
        assert cache.stats().bytes_written == 0

    def test_half_way_to_expiry_a_chunk_still_in_use_is_written_afresh(self, redis_server, client, caches):
        clock = ManualClock()
        cache = caches(redis_server.url, clock=clock)
        store(cache, TOKENS)
        cache.flush(10)
        client.flushall()
        store(cache, TOKENS)
        cache.flush(10)
        assert client.dbsize() == 0
        clock.advance(1800_000)
        assert store(cache, TOKENS) == 0
        cache.flush(10)
        assert client.dbsize() == N

    @pytest.mark.parametrize("read_bytes", [1, 2 * record_bytes(SHAPE), 1 << 20])
    def test_any_number_of_round_trips(self, redis_server, filled, caches, read_bytes):
        assert hits(caches(redis_server.url, remote_read_bytes=read_bytes), TOKENS) == (0, N)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_large_chunks_of_other_dtypes(self, redis_server, client, caches, dtype):
        shape = replace(SHAPE, dtype=dtype, layers=16, head_dim=512)
        store(writer := caches(redis_server.url, shape=shape), TOKENS)
        assert writer.flush(10)
        assert hits(caches(redis_server.url, shape=shape), TOKENS) == (0, N)

    def test_over_a_unix_socket(self, redis_server, filled, caches):
        assert hits(caches(f"unix://{redis_server.socket_path}"), TOKENS) == (0, N)

    def test_where_prefill_is_cheaper_redis_is_left_alone(self, redis_server, filled, caches):
        cache = caches(redis_server.url, capacity=0)
        assert hits(cache, TOKENS) == (0, N)
        assert len(cache.fetch_and_lookup(TOKENS, prefill_ms_per_token=1e-9).chunks) == 0
        assert len(cache.fetch_and_lookup(TOKENS, prefill_ms_per_token=1e9).chunks) == N

    def test_a_failed_store_writes_nothing_of_the_failed_chunk(self, redis_server, client, caches):
        cache = caches(redis_server.url, capacity=1)
        with pytest.raises(RuntimeError):
            cache.store(TOKENS, reader(TOKENS, fail_at=2))
        assert cache.flush(10)
        assert keys_in(client) == sorted(KEYS[:2])
        assert hits(caches(redis_server.url), TOKENS) == (0, 2)


class TestDamage:
    @pytest.mark.parametrize("position", [*range(HEADER_BYTES), HEADER_BYTES, record_bytes(SHAPE) - 1])
    def test_a_flipped_bit_is_a_miss_and_the_key_is_deleted(self, redis_server, filled, client, caches, position):
        byte = client.getrange(KEYS[2], position, position)[0]
        client.setrange(KEYS[2], position, bytes([byte ^ 0x10]))
        cache = caches(redis_server.url)
        assert hits(cache, TOKENS) == (0, 2)
        assert cache.stats().remote_corrupt == 1
        assert cache.flush(10)
        assert not client.exists(KEYS[2])
        # The cache repairs it: the recomputed chunk is written, and then found.
        store(cache, TOKENS)
        assert cache.flush(10)
        assert hits(caches(redis_server.url), TOKENS) == (0, N)

    @pytest.mark.parametrize("value", [b"x", b"x" * (1 << 20), None])
    def test_a_foreign_value_is_a_miss_and_deleted(self, redis_server, filled, client, caches, value):
        client.delete(KEYS[0])
        client.rpush(KEYS[0], "a list") if value is None else client.set(KEYS[0], value)
        cache = caches(redis_server.url)
        assert hits(cache, TOKENS) == (0, 0)
        assert cache.stats().remote_corrupt == 1
        assert cache.flush(10)
        assert not client.exists(KEYS[0])

    def test_a_record_of_another_chunk_under_the_key_is_a_miss(self, redis_server, filled, client, caches):
        client.copy(KEYS[1], KEYS[0], replace=True)
        cache = caches(redis_server.url)
        assert hits(cache, TOKENS) == (0, 0)
        assert cache.stats().remote_corrupt == 1

    @pytest.mark.parametrize("gone", range(N))
    def test_a_missing_chunk_ends_the_prefix(self, redis_server, filled, client, caches, gone):
        client.delete(KEYS[gone])
        cache = caches(redis_server.url)
        assert hits(cache, TOKENS) == (0, gone)
        stats = cache.stats()
        assert (stats.remote_corrupt, stats.remote_errors, stats.remote_timeouts) == (0, 0, 0)

    def test_a_chunk_that_goes_between_the_question_and_the_read(
        self, redis_server, filled, client, caches, monkeypatch
    ):
        cache = caches(redis_server.url)
        probe = cache._remote._probe

        def probe_then_lose(*arguments):
            present = probe(*arguments)
            client.delete(KEYS[3])
            return present

        monkeypatch.setattr(cache._remote, "_probe", probe_then_lose)
        assert hits(cache, TOKENS) == (0, 3)
        monkeypatch.undo()
        assert hits(cache, TOKENS) == (3, 0)


class TestOutage:
    DEADLINE_MS = 200.0

    def cache(self, caches, proxy, clock=None):
        return caches(proxy.url, clock=clock, capacity=0, remote_deadline_ms=self.DEADLINE_MS)

    def timed_hits(self, cache):
        began = time.monotonic()
        found = hits(cache, TOKENS)
        assert time.monotonic() - began < 2.0, "the look-up outlived its deadline by far"
        return found

    def test_through_the_proxy_all_is_well(self, proxy, filled, caches):
        assert hits(caches(proxy.url), TOKENS) == (0, N)

    def test_starts_without_redis_and_finds_it_when_it_comes(self, proxy, filled, caches):
        proxy.down()
        clock = ManualClock()
        cache = self.cache(caches, proxy, clock)
        for _ in range(5):
            assert self.timed_hits(cache) == (0, 0)
        assert cache.stats().remote_errors == 3, "the breaker should have spared Redis the rest"
        proxy.pass_through()
        assert hits(cache, TOKENS) == (0, 0)
        clock.advance(2000)
        assert hits(cache, TOKENS) == (0, N)

    def test_goes_down_in_between(self, proxy, filled, caches):
        cache = self.cache(caches, proxy)
        assert hits(cache, TOKENS) == (0, N)
        proxy.down()
        assert self.timed_hits(cache) == (0, 0)
        proxy.pass_through()
        assert hits(cache, TOKENS) == (0, N)

    @pytest.mark.parametrize("connected", [False, True])
    @pytest.mark.parametrize("fault", ["stall", "drip"])
    def test_stalled_or_dripping(self, proxy, filled, caches, fault, connected):
        cache = self.cache(caches, proxy)
        if connected:
            assert hits(cache, TOKENS) == (0, N)
        getattr(proxy, fault)()
        before = proxy.accepted
        for _ in range(2):
            assert self.timed_hits(cache)[1] < N
        assert cache.stats().remote_timeouts == 2
        proxy.pass_through()
        assert hits(cache, TOKENS) == (0, N)
        assert proxy.accepted > before, "a connection that timed out was used again"

    @pytest.mark.parametrize(
        ("answered", "usable"),
        # Redis sends five lengths as ":384\r\n", then values as "$384\r\n", 384 bytes and "\r\n".
        [(0, 0), (3, 0), (30, 0), (33, 0), (36 + 100, 0), (30 + 391, 0), (30 + 392, 1), (30 + 3 * 392 + 7, 3)],
    )
    def test_truncated_answers_leave_the_chunks_that_came_whole(self, proxy, filled, caches, answered, usable):
        assert record_bytes(SHAPE) == 384
        cache = self.cache(caches, proxy)
        proxy.truncate(answered)
        assert self.timed_hits(cache) == (0, usable)
        assert cache.stats().remote_errors == 1
        proxy.pass_through()
        assert hits(cache, TOKENS) == (0, N)


class TestWriting:
    def test_a_full_queue_drops_the_newest(self, proxy, client, caches):
        proxy.stall()
        cache = caches(proxy.url, write_queue_bytes=3 * SHAPE.size_bytes)
        store(cache, TOKENS)
        stats = cache.stats()
        assert stats.write_dropped == 2
        assert stats.queued_bytes == 3 * SHAPE.size_bytes

    def test_the_queue_keeps_the_oldest(self, proxy, client, caches):
        cache = caches(proxy.url, write_queue_bytes=3 * SHAPE.size_bytes, write_flush_ms=60_000.0)
        store(cache, TOKENS)
        assert cache.flush(10)
        assert keys_in(client) == sorted(KEYS[:3])
        assert cache.stats().queued_bytes == 0
        store(cache, TOKENS)
        assert cache.flush(10)
        assert client.dbsize() == N, "what was dropped is offered again with the next store"

    def test_close_writes_what_is_queued(self, redis_server, client):
        cache = make_cache(redis_server.url, write_flush_ms=60_000.0)
        store(cache, TOKENS)
        cache.close(10)
        cache.close(10)
        assert client.dbsize() == N

    def test_close_gives_up_in_time_when_redis_hangs(self, proxy):
        proxy.stall()
        cache = make_cache(proxy.url)
        store(cache, TOKENS)
        began = time.monotonic()
        cache.close(0.1)
        assert time.monotonic() - began < 3
        assert not cache._remote.writes._thread.is_alive()
        assert cache.stats().write_dropped == N
        assert cache.stats().queued_bytes == 0

    def test_time_alone_flushes(self, redis_server, client, caches):
        cache = caches(redis_server.url, write_flush_ms=5.0)
        store(cache, TOKENS)
        give_up_s = time.monotonic() + 20
        while cache.stats().queued_bytes and time.monotonic() < give_up_s:
            time.sleep(0.005)
        assert client.dbsize() == N

    def test_without_redis_chunks_are_dropped_and_the_engine_goes_on(self, proxy, client, caches):
        proxy.down()
        clock = ManualClock()
        cache = caches(proxy.url, clock=clock, breaker_failures=1)
        assert store(cache, TOKENS) == N
        assert cache.flush(10)
        assert hits(cache, TOKENS) == (N, 0)
        assert cache.stats().write_dropped == N
        assert cache.stats().queued_bytes == 0
        proxy.pass_through()
        store(cache, TOKENS)
        assert client.dbsize() == 0
        clock.advance(2000)
        store(cache, TOKENS)
        assert cache.flush(10)
        assert client.dbsize() == N

    def test_redis_that_is_full_refuses_and_is_believed(self, tmp_path, caches):
        server = RedisServer(tmp_path)
        try:
            client = redis.Redis(port=server.port)
            client.config_set("maxmemory", 1)
            cache = caches(server.url, breaker_failures=1)
            store(cache, TOKENS)
            assert cache.flush(10)
            stats = cache.stats()
            assert (stats.bytes_written, stats.write_dropped) == (0, N)
            assert stats.remote_errors >= 1
            assert all(cache._remote.writes.wants(bytes.fromhex(key.split(":")[1])) for key in KEYS)
        finally:
            server.stop()


class TestUnexpectedErrors:
    """An unexpected exception is a miss, and leaves breaker and chunks in a consistent state."""

    def test_of_reads(self, redis_server, filled, caches, monkeypatch):
        clock = ManualClock()
        cache = caches(redis_server.url, clock=clock, capacity=0, breaker_failures=1)

        def fails(*_):
            raise KeyError("nobody thought of it")

        with monkeypatch.context() as broken:
            broken.setattr(cache._remote, "_probe", fails)
            assert hits(cache, TOKENS) == (0, 0)
            clock.advance(2000)
            assert hits(cache, TOKENS) == (0, 0)
        stats = cache.stats()
        assert (stats.remote_errors, stats.pinned_chunks, stats.fetched_bytes) == (2, 0, 0)
        clock.advance(2000)
        assert hits(cache, TOKENS) == (0, N)

    def test_of_writes(self, redis_server, client, caches, monkeypatch):
        clock = ManualClock()
        cache = caches(redis_server.url, clock=clock, breaker_failures=1)
        writes = cache._remote.writes

        def fails(*_):
            raise KeyError("nobody thought of it")

        with monkeypatch.context() as broken:
            broken.setattr(writes, "_send", fails)
            for _ in range(2):
                store(cache, TOKENS)
                assert cache.flush(10)
                clock.advance(2000)
        stats = cache.stats()
        assert (stats.remote_errors, stats.write_dropped, stats.queued_bytes, stats.pinned_chunks) == (2, 2 * N, 0, 0)
        store(cache, TOKENS)
        assert cache.flush(10)
        assert client.dbsize() == N


class TestClusterMode:
    @pytest.fixture
    def cluster(self, tmp_path):
        """A cluster node that serves no slot of the keys."""
        # Its default for the cluster bus is this port plus 10,000, which may not be a valid port.
        server = RedisServer(tmp_path, "--cluster-enabled", "yes", "--cluster-port", str(free_port()))
        yield server
        server.stop()

    def test_is_told_in_one_line_and_left_for_good(self, cluster, caches, caplog):
        clock = ManualClock()
        cache = caches(cluster.url, clock=clock, capacity=0, breaker_failures=100)
        for _ in range(3):
            store(cache, TOKENS)
            assert cache.flush(10)
            assert hits(cache, TOKENS) == (0, 0)
            clock.advance(60_000)
        assert cache.prefetch(TOKENS) is None
        assert cache.stats().bytes_written == 0
        (line,) = [record.getMessage() for record in caplog.records]
        assert "cluster mode" in line
        assert "redis_url" in line

    def test_a_moved_key_is_told_as_well(self, redis_server, filled, caches, monkeypatch, caplog):
        cache = caches(redis_server.url)
        _receive = RedisConnection._receive
        answered = b"-MOVED 3999 127.0.0.1:6381\r\n"

        def moved(connection, target, deadline):
            _receive(connection, target, deadline)
            target[: len(answered)] = answered
            return len(answered)

        monkeypatch.setattr(RedisConnection, "_receive", moved)
        assert hits(cache, TOKENS) == (0, 0)
        assert "runs in cluster mode" in caplog.text
        assert cache.prefetch(TOKENS) is None

    def test_is_refused_where_the_job_is_submitted(self, cluster):
        config = JobConfig(cache=CacheConfig(remote=RemoteConfig(redis_url=cluster.url)))
        with pytest.raises(UserError, match=r"^redis_url: Redis at .* runs in cluster mode.*name a Redis without it$"):
            check_before_start(config)

    def test_another_redis_or_one_that_is_away_is_not_refused(self, redis_server, proxy):
        check_before_start(JobConfig(cache=CacheConfig(remote=RemoteConfig(redis_url=redis_server.url))))
        proxy.down()
        check_before_start(JobConfig(cache=CacheConfig(remote=RemoteConfig(redis_url=proxy.url))))


def test_the_proxy_itself_refuses_when_down(redis_server, caches):
    proxy = Proxy(redis_server.port)
    proxy.down()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port), timeout=5)
    proxy.close()

"""The prefetch thread over a scripted Redis: order, bounds, shared chunks, and released chunks."""

import threading

import pytest
import torch
from cache_support import IDENTITY, SHAPE, given, make_cache, prompt, store
from hypothesis import strategies as st

from cache.keys import KeySchema
from cache.prefetch import Fetcher, QueuedFetch

KEYS = KeySchema(IDENTITY, SHAPE)
WAIT_S = 20.0


class ScriptedRedis:
    """Delivers every requested chunk when `step` allows it, and records the order of prompts."""

    def __init__(self, free: bool = True) -> None:
        self.asked: list[tuple[bytes, ...]] = []
        self.began = threading.Semaphore(0)
        self.steps = threading.Semaphore(0)
        self.free = free
        self.broken = False
        self.stopped_early = 0

    def read(self, fingerprint, hashes, prefill_ms_per_token, land) -> None:
        self.asked.append(tuple(hashes))
        self.began.release()
        if self.broken:
            raise RuntimeError("nobody thought of it")
        for key in hashes:
            if not self.free:
                assert self.steps.acquire(timeout=WAIT_S)
            if not land(key, torch.zeros(SHAPE.size)):
                self.stopped_early += 1
                return


@pytest.fixture
def fetcher_of():
    opened = []

    def make(redis: ScriptedRedis, limit_chunks: int = 100, resident=frozenset(), deadline_ms=60_000.0) -> Fetcher:
        fetcher = Fetcher(
            redis.read,
            resident.__contains__,
            chunk_bytes=SHAPE.size_bytes,
            limit_bytes=limit_chunks * SHAPE.size_bytes,
            deadline_ms=deadline_ms,
        )
        opened.append((fetcher, redis))
        return fetcher

    yield make
    for fetcher, redis in opened:
        redis.free = True
        redis.steps.release(1000)
        fetcher.close()
        assert not fetcher._thread.is_alive()


def begin(fetcher: Fetcher, tokens: list[int], priority: int = 0) -> QueuedFetch:
    return fetcher.begin(KEYS.of(tokens), None, priority)


def keys(tokens: list[int]) -> tuple[bytes, ...]:
    return KEYS.of(tokens).hashes


def finished(fetch: QueuedFetch) -> bool:
    return fetch._finished.wait(WAIT_S)


def test_a_higher_priority_is_fetched_first_and_equals_in_order(fetcher_of) -> None:
    redis = ScriptedRedis(free=False)
    fetcher = fetcher_of(redis)
    first = begin(fetcher, prompt(1, first=0))
    assert redis.began.acquire(timeout=WAIT_S)
    waiting = [begin(fetcher, prompt(1, first=n), priority) for n, priority in ((1, 0), (2, 0), (3, 5))]
    redis.free = True
    redis.steps.release()
    assert all(finished(fetch) for fetch in (first, *waiting))
    assert redis.asked == [keys(prompt(1, first=n)) for n in (0, 3, 1, 2)]


def test_what_is_resident_is_not_asked_for(fetcher_of) -> None:
    redis, tokens = ScriptedRedis(), prompt(3)
    fetcher = fetcher_of(redis, resident=frozenset(keys(tokens)[:1]))
    fetch = begin(fetcher, tokens)
    assert finished(fetch)
    assert redis.asked == [keys(tokens)[1:]]
    assert tuple(fetch.take()) == keys(tokens)[1:]
    assert fetch.take() == {}


def test_a_look_up_takes_what_has_come_and_the_fetch_stops(fetcher_of) -> None:
    redis, tokens = ScriptedRedis(free=False), prompt(4)
    fetcher = fetcher_of(redis)
    fetch = begin(fetcher, tokens)
    assert redis.began.acquire(timeout=WAIT_S)
    assert fetcher.held_bytes == 4 * SHAPE.size_bytes
    redis.steps.release(2)
    while len(fetch._landed) < 2:
        fetch._finished.wait(0.001)
    assert not fetch.ready
    assert tuple(fetch.take()) == keys(tokens)[:2]
    redis.steps.release()
    assert finished(fetch)
    assert redis.stopped_early == 1
    assert fetcher.held_bytes == 0


def test_nothing_is_waited_for_beyond_the_deadline(fetcher_of) -> None:
    redis = ScriptedRedis(free=False)
    fetch = begin(fetcher_of(redis, deadline_ms=1.0), prompt(1))
    fetch.wait(WAIT_S)
    assert fetch.ready
    assert not fetch._finished.is_set()
    assert fetch.take() == {}


def test_prompts_with_one_beginning_fetch_it_once(fetcher_of) -> None:
    redis = ScriptedRedis()
    fetcher = fetcher_of(redis)
    short, long = begin(fetcher, prompt(2)), begin(fetcher, prompt(3))
    assert finished(short)
    assert finished(long)
    assert redis.asked == [keys(prompt(2)), keys(prompt(3))[2:]]
    assert fetcher.held_bytes == 3 * SHAPE.size_bytes
    # The chunks are kept although the request for which they were fetched is gone.
    short.cancel()
    assert fetcher.held_bytes == 3 * SHAPE.size_bytes
    assert set(long.take()) == set(keys(prompt(3)))
    assert fetcher.held_bytes == 0


def test_a_full_thread_waits_until_chunks_are_taken(fetcher_of) -> None:
    redis = ScriptedRedis()
    fetcher = fetcher_of(redis, limit_chunks=3)
    first, second, third = (begin(fetcher, prompt(2, first=n)) for n in range(3))
    assert finished(first)
    second.cancel()  # It was before the third in the queue, and is not asked for any more.
    assert fetcher.held_bytes == 2 * SHAPE.size_bytes
    assert len(first.take()) == 2
    assert finished(third)
    assert redis.asked == [keys(prompt(2, first=n)) for n in (0, 2)]


def test_a_prompt_longer_than_the_bound_is_fetched_in_part(fetcher_of) -> None:
    redis = ScriptedRedis()
    fetch = begin(fetcher_of(redis, limit_chunks=2), prompt(5))
    assert finished(fetch)
    assert tuple(fetch.take()) == keys(prompt(5))[:2]


def test_an_unexpected_error_ends_one_fetch_alone(fetcher_of) -> None:
    redis = ScriptedRedis()
    fetcher = fetcher_of(redis)
    redis.broken = True
    assert finished(bad := begin(fetcher, prompt(1, first=1)))
    assert (bad.take(), fetcher.held_bytes) == ({}, 0)
    redis.broken = False
    assert finished(good := begin(fetcher, prompt(1, first=2)))
    assert len(good.take()) == 1


def test_closing_lets_everybody_go(fetcher_of) -> None:
    redis = ScriptedRedis()
    fetcher = fetcher_of(redis, limit_chunks=1)
    assert finished(begin(fetcher, prompt(1, first=1)))
    waiting = begin(fetcher, prompt(1, first=2))
    assert not waiting.ready
    fetcher.close()
    assert waiting.ready
    assert begin(fetcher, prompt(1, first=3)).ready


@given(
    st.integers(0, 5),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 1), st.booleans()), max_size=12),
)
def test_what_has_come_stays_within_its_bound_and_all_of_it_is_let_go(limit, orders) -> None:
    redis = ScriptedRedis()
    fetcher = Fetcher(
        redis.read,
        frozenset().__contains__,
        chunk_bytes=SHAPE.size_bytes,
        limit_bytes=limit * SHAPE.size_bytes,
        deadline_ms=60_000.0,
    )
    fetches = []
    for first, chunks, priority, cancels in orders:
        fetches.append(begin(fetcher, prompt(chunks, first=first), priority))
        assert fetcher.held_bytes <= limit * SHAPE.size_bytes
        if cancels:
            fetches[len(fetches) // 2].cancel()
    # In the order of the queue, as an engine takes them.
    for fetch in sorted(fetches, key=lambda fetch: -orders[fetches.index(fetch)][2]):
        if not fetch._taken:
            assert finished(fetch)
        assert fetcher.held_bytes <= limit * SHAPE.size_bytes
        taken = fetch.take()
        assert list(taken) == [key for key in fetch.keys.hashes if key in taken]
    assert fetcher.held_bytes == 0
    fetcher.close()
    assert not fetcher._thread.is_alive()


class TestThroughTheCache:
    def test_nothing_is_fetched_without_redis_or_for_what_is_local(self, redis_server, client, caches) -> None:
        assert caches().prefetch(prompt(2)) is None
        cache = caches(redis_server.url)
        store(cache, prompt(2))
        assert cache.prefetch(prompt(2)) is None
        assert cache.prefetch(prompt(2), salt="another") is not None

    def test_a_look_up_does_not_wait_for_a_redis_that_hangs(self, proxy, caches) -> None:
        proxy.stall()
        cache = caches(proxy.url, remote_deadline_ms=60_000.0)
        fetch = cache.prefetch(prompt(2))
        with cache.lookup(prompt(2), prefetch=fetch) as prefix:
            assert not fetch._finished.is_set()
            assert prefix.chunks == []

    def test_while_redis_is_left_alone_nothing_is_fetched(self, proxy, caches) -> None:
        proxy.down()
        cache = caches(proxy.url, breaker_failures=1)
        assert cache.prefetch(prompt(1)) is not None
        cache.fetch_and_lookup(prompt(1)).release()
        assert cache.prefetch(prompt(1)) is None

    def test_fetched_bytes_are_accounted_until_they_are_taken(self, redis_server, client, caches) -> None:
        store(writer := make_cache(redis_server.url), prompt(3))
        writer.close()
        cache = caches(redis_server.url)
        fetch = cache.prefetch(prompt(3))
        assert finished(fetch)
        stats = cache.stats()
        assert (stats.fetched_bytes, stats.local_bytes) == (3 * SHAPE.size_bytes, 0)
        with cache.lookup(prompt(3), prefetch=fetch) as prefix:
            assert prefix.remote_chunks == 3
            stats = cache.stats()
            assert (stats.fetched_bytes, stats.local_bytes) == (0, 3 * SHAPE.size_bytes)

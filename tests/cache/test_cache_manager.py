"""The whole cache compared with a plain dictionary."""

from contextlib import suppress

import pytest
from cache_support import IDENTITY, LIMITS, SHAPE, C, check_prefix, hits, make_cache, prompt, reader, store
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cache.config import CacheConfig, RemoteConfig
from cache.eviction.lru import LRU
from cache.keys import KeySchema
from cache.local import LocalTier
from cache.manager import TwoLevelCache, open_cache
from core.clock import ManualClock
from core.errors import UserError

# Few different chunks, so that prompts share prefixes; lengths around the multiples of a chunk.
prompts = st.builds(
    lambda heads, rest: [head for head in heads for _ in range(C)] + [9] * rest,
    st.lists(st.integers(0, 2), max_size=4),
    st.integers(0, C - 1),
)
salts = st.sampled_from(["", "tenant"])


class Scripted:
    """A sizing policy whose capacity a test sets."""

    capacity_chunks = 3

    def observe(self, now_ms, keys):
        return self.capacity_chunks


class CacheAgainstDictionary(RuleBasedStateMachine):
    """The dictionary has every chunk ever stored. A cache may lose any of them, but must not return any other."""

    url = None
    PREFETCH_CHUNKS = 7

    @initialize()
    def open(self):
        self.sizing = Scripted()
        if self.url is None:
            local = LocalTier(3, SHAPE.size_bytes, LRU())
            keys = KeySchema(IDENTITY, SHAPE)
            self.cache = TwoLevelCache(
                shape=SHAPE, keys=keys, local=local, sizing=self.sizing, remote=None, clock=ManualClock()
            )
        else:
            # Another weights digest for each run, so that runs do not find each other's chunks.
            CacheAgainstDictionary.runs += 1
            identity = type(IDENTITY)(f"run {CacheAgainstDictionary.runs}", "", "")
            limit_bytes = self.PREFETCH_CHUNKS * SHAPE.size_bytes
            self.cache = make_cache(self.url, capacity=3, identity=identity, prefetch_bytes=limit_bytes)
            self.cache._sizing = self.sizing
        self.stored: set[tuple] = set()
        self.prefixes: list = []
        self.fetches: list = []
        self.begun: list = []
        self.looked_up = self.local = self.remote = 0

    runs = 0

    def chunks_of(self, tokens, salt):
        return [(salt, tuple(tokens[: end + C])) for end in range(0, len(tokens) - C + 1, C)]

    @rule(tokens=prompts, salt=salts)
    def look_up(self, tokens, salt):
        self.check(self.cache.fetch_and_lookup(tokens, salt), tokens, salt)

    @rule(tokens=prompts, salt=salts)
    def prefetch(self, tokens, salt):
        fetch = self.cache.prefetch(tokens, salt)
        if fetch is not None:
            self.fetches.append((fetch, tokens, salt))
            self.begun.append(fetch)

    @precondition(lambda self: self.fetches)
    @rule(data=st.data(), finish=st.booleans())
    def look_up_what_was_prefetched(self, data, finish):
        """Look up with the chunks fetched so far, or all of them; local chunks may have changed meanwhile."""
        fetch, tokens, salt = self.fetches.pop(data.draw(st.integers(0, len(self.fetches) - 1)))
        if finish:
            fetch.wait(10)
        self.check(self.cache.lookup(tokens, salt, fetch), tokens, salt)

    @precondition(lambda self: self.fetches)
    @rule(data=st.data())
    def cancel(self, data):
        fetch, _, _ = self.fetches.pop(data.draw(st.integers(0, len(self.fetches) - 1)))
        fetch.cancel()
        fetch.cancel()

    def check(self, prefix, tokens, salt):
        chunks = self.chunks_of(tokens, salt)
        check_prefix(prefix, tokens, salt)
        assert self.stored.issuperset(chunks[: len(prefix.chunks)])
        assert prefix.capacity_chunks == self.sizing.capacity_chunks
        self.looked_up += len(chunks)
        self.local += prefix.local_chunks
        self.remote += prefix.remote_chunks
        computed = len(tokens) - len(prefix.chunks) * C
        assert computed >= 0
        self.prefixes.append((prefix, tokens, salt))

    @rule(tokens=prompts, salt=salts)
    def store(self, tokens, salt):
        store(self.cache, tokens, salt)
        self.stored.update(self.chunks_of(tokens, salt))

    @rule(tokens=prompts, salt=salts)
    def store_then_find_all_if_there_is_room(self, tokens, salt):
        self.store(tokens, salt)
        chunks = self.chunks_of(tokens, salt)
        pinned = self.cache.stats().pinned_chunks
        if len(chunks) + pinned <= min(self.sizing.capacity_chunks, self.cache.stats().capacity_chunks):
            self.look_up(tokens, salt)
            assert len(self.prefixes[-1][0].chunks) == len(chunks)

    @rule(tokens=prompts, salt=salts, at=st.integers(0, 3))
    def store_that_fails(self, tokens, salt, at):
        missing = None
        try:
            self.cache.store(tokens, reader(tokens, salt, fail_at=at), salt)
        except RuntimeError:
            missing = at
        # The chunks before the failure are complete; the failed chunk and those after it were not read.
        self.stored.update(self.chunks_of(tokens, salt)[:missing])

    @precondition(lambda self: self.prefixes)
    @rule(data=st.data())
    def release(self, data):
        prefix, _, _ = self.prefixes.pop(data.draw(st.integers(0, len(self.prefixes) - 1)))
        prefix.release()
        prefix.release()

    @rule(capacity=st.integers(0, 6))
    def resize(self, capacity):
        self.sizing.capacity_chunks = capacity

    @precondition(lambda self: self.url is not None)
    @rule()
    def flush(self):
        assert self.cache.flush(10)

    @invariant()
    def prefixes_hold(self):
        for prefix, tokens, salt in getattr(self, "prefixes", []):
            check_prefix(prefix, tokens, salt)

    @invariant()
    def counts_and_bytes_are_true(self):
        if not hasattr(self, "cache"):
            return
        stats, local = self.cache.stats(), self.cache._local
        actual = sum(entry.chunk.untyped_storage().nbytes() for entry in local._entries.values())
        assert stats.local_bytes == actual
        assert stats.used_chunks <= max(stats.capacity_chunks, stats.pinned_chunks)
        held = {id(chunk) for prefix, _, _ in self.prefixes for chunk in prefix.chunks}
        inside = {id(entry.chunk) for entry in local._entries.values()}
        assert stats.pinned_chunks == len(held & inside)
        outside = sum(1 for prefix, _, _ in self.prefixes for chunk in prefix.chunks if id(chunk) not in inside)
        assert stats.pinned_outside_bytes == outside * SHAPE.size_bytes
        assert stats.fetched_bytes <= self.PREFETCH_CHUNKS * SHAPE.size_bytes
        assert (stats.chunks_looked_up, stats.local_chunks_hit, stats.remote_chunks_hit) == (
            self.looked_up,
            self.local,
            self.remote,
        )

    def teardown(self):
        if hasattr(self, "cache"):
            for prefix, _, _ in self.prefixes:
                prefix.release()
            for fetch, _, _ in self.fetches:
                fetch.cancel()
            # A prefetch that was cancelled or taken earlier may still be reading.
            for fetch in self.begun:
                fetch.finish()
            assert self.cache.stats().fetched_bytes == 0
            assert self.cache.stats().pinned_chunks == 0
            assert self.cache.stats().pinned_outside_bytes == 0
            self.cache.close(5)


CacheAgainstDictionary.TestCase.settings = settings(LIMITS, max_examples=60, stateful_step_count=30)
TestCacheAgainstDictionary = CacheAgainstDictionary.TestCase


def test_cache_with_redis_against_dictionary(redis_server, client):
    class WithRedis(CacheAgainstDictionary):
        url = redis_server.url

    run_state_machine_as_test(WithRedis, settings=settings(LIMITS, max_examples=20, stateful_step_count=25))


@pytest.mark.parametrize("length", [0, 1, C - 1, C, C + 1, 3 * C - 1, 3 * C, 3 * C + 1])
def test_every_length_around_a_multiple_of_a_chunk(caches, length):
    cache, tokens = caches(), list(range(length))
    assert hits(cache, tokens) == (0, 0)
    assert store(cache, tokens) == length // C
    assert hits(cache, tokens) == (length // C, 0)
    assert store(cache, tokens) == 0


@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_a_store_that_fails_is_a_miss_from_there_on(caches, fail_at):
    cache, tokens = caches(), prompt(3)
    with pytest.raises(RuntimeError, match="the engine failed"):
        cache.store(tokens, reader(tokens, fail_at=fail_at))
    assert hits(cache, tokens) == (fail_at, 0)
    assert cache.stats().used_chunks == fail_at
    assert cache.stats().pinned_chunks == 0
    assert store(cache, tokens) == 3 - fail_at
    assert hits(cache, tokens) == (3, 0)


def test_a_store_never_evicts_its_own_prompt(caches):
    cache = caches(capacity=2)
    store(cache, prompt(2, first=1))
    assert store(cache, prompt(5)) == 2
    assert hits(cache, prompt(5)) == (2, 0)
    assert cache.stats().chunks_refused == 3


def test_what_is_pinned_is_neither_evicted_nor_in_the_way_of_a_shrink(caches):
    cache, sizing = caches(), Scripted()
    cache._sizing = sizing
    sizing.capacity_chunks = 4
    store(cache, prompt(3))
    prefix = cache.lookup(prompt(3))
    sizing.capacity_chunks = 1
    assert hits(cache, prompt(1, first=5)) == (0, 0)
    assert store(cache, prompt(2, first=5)) == 0
    check_prefix(prefix, prompt(3), "")
    assert cache.stats().used_chunks == 3
    prefix.release()
    assert cache.stats().used_chunks == 1
    assert hits(cache, prompt(3)) == (1, 0)


def test_a_prefix_is_released_with_its_block_even_on_an_error(caches):
    cache = caches()
    store(cache, prompt(2))
    with suppress(KeyError), cache.lookup(prompt(2)):
        assert cache.stats().pinned_chunks == 2
        raise KeyError
    assert cache.stats().pinned_chunks == 0


def test_chunks_behind_a_gap_are_no_hits_and_are_let_go(caches):
    cache = caches()
    store(cache, prompt(3))
    gap = KeySchema(IDENTITY, SHAPE).of(prompt(3)).hashes[1]
    cache._local._eviction.on_remove(gap)
    del cache._local._entries[gap]
    prefix = cache.lookup(prompt(3))
    assert list(prefix.tiers) == ["local"]
    assert cache.stats().pinned_chunks == 1
    prefix.release()
    assert cache.stats().pinned_chunks == 0


def test_the_prefix_reports_the_capacity_and_use_of_its_moment(caches):
    cache = caches(capacity=5)
    store(cache, prompt(3))
    with cache.lookup(prompt(1)) as prefix:
        assert (prefix.capacity_chunks, prefix.used_chunks) == (5, 3)


@pytest.mark.parametrize("at", ["sizing", "request", "arrange", "insert"])
def test_a_look_up_never_raises_and_pins_nothing_when_a_policy_fails(redis_server, client, caches, at, monkeypatch):
    store(writer := make_cache(redis_server.url), prompt(4))
    writer.close()
    cache = caches(redis_server.url)
    store(cache, prompt(2))

    def fails(*_):
        raise ValueError("nobody thought of it")

    policy = cache._local._eviction
    name = {"request": "on_request", "arrange": "arrange", "insert": "on_insert"}.get(at)
    with monkeypatch.context() as broken:
        broken.setattr(*((cache._sizing, "observe") if name is None else (policy, name)), fails)
        with cache.fetch_and_lookup(prompt(4)) as prefix:
            assert (prefix.chunks, prefix.local_chunks, prefix.remote_chunks) == ([], 0, 0)
        stats = cache.stats()
        assert (stats.pinned_chunks, stats.fetched_bytes, stats.pinned_outside_bytes) == (0, 0, 0)
        assert stats.local_bytes == len(list(cache._local)) * SHAPE.size_bytes
    assert sum(hits(cache, prompt(4))) == 4


def test_a_store_whose_policy_fails_pins_nothing(caches, monkeypatch):
    cache = caches()

    def fails(*_):
        raise ValueError("nobody thought of it")

    with monkeypatch.context() as broken:
        broken.setattr(cache._local._eviction, "arrange", fails)
        with pytest.raises(ValueError, match="nobody"):
            store(cache, prompt(2))
    assert cache.stats().pinned_chunks == 0
    assert hits(cache, prompt(2)) == (2, 0)


def test_a_token_that_no_key_can_hold_is_a_miss(redis_server, caches):
    cache = caches(redis_server.url)
    assert cache.prefetch([-1] * C) is None
    assert cache.lookup([-1] * C).chunks == []


def test_a_url_that_is_none_is_a_user_error():
    for url in ("http://h/0", "redis://h:port/0", "redis://h/0?db=x", "unix://"):
        config = CacheConfig(chunk_tokens=C, remote=RemoteConfig(redis_url=url))
        with pytest.raises(UserError, match="redis_url"):
            open_cache(config, SHAPE, IDENTITY, ManualClock())


def test_a_shape_of_another_chunk_size_is_refused():
    with pytest.raises(ValueError, match="tokens"):
        open_cache(CacheConfig(chunk_tokens=C + 1), SHAPE, IDENTITY, ManualClock())

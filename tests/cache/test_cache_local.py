"""The local tier compared with a model of plain dictionaries and lists."""

from contextlib import suppress

import pytest
import torch
from cache_support import LIMITS, SHAPE, given, same_bits, stamp
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cache.eviction.lru import LRU
from cache.local import LocalTier

numbers = st.integers(0, 11)


def key(number: int) -> bytes:
    return bytes([number]) * 32


def content(number: int) -> torch.Tensor:
    return stamp([number] * SHAPE.chunk_tokens, 0)


class LocalTierAgainstModel(RuleBasedStateMachine):
    """The model: keys in the order of eviction, and the number of pins of each."""

    def __init__(self) -> None:
        super().__init__()
        self.tier = LocalTier(4, SHAPE.size_bytes, LRU())
        self.capacity = 4
        self.order: list[int] = []
        self.pins: dict[int, int] = {}
        self.evicted = 0
        self.held: list[tuple[int, torch.Tensor]] = []

    def make_room(self, chunks: int) -> None:
        for number in list(self.order):
            if len(self.order) <= max(chunks, 0):
                return
            if not self.pins.get(number):
                self.order.remove(number)
                self.evicted += 1

    @rule(number=numbers)
    def put(self, number):
        if number in self.order:
            return
        self.make_room(self.capacity - 1)
        fits = len(self.order) < self.capacity
        assert self.tier.put(key(number), content(number)) is fits
        if fits:
            self.order.append(number)

    @rule(number=numbers)
    def a_reservation_that_fails_leaves_nothing(self, number):
        if number in self.order:
            return
        self.make_room(self.capacity - 1)
        with suppress(KeyboardInterrupt), self.tier.reserve(key(number)) as reservation:
            assert (reservation is not None) is (len(self.order) < self.capacity)
            assert self.tier.used_chunks == len(self.order) + (reservation is not None)
            assert self.tier.used_chunks <= max(self.capacity, len(self.order))
            raise KeyboardInterrupt  # As when the engine is ended in the middle.

    @rule(number=numbers)
    def pin(self, number):
        chunk = self.tier.pin(key(number))
        assert (chunk is not None) is (number in self.order)
        if chunk is not None:
            self.pins[number] = self.pins.get(number, 0) + 1
            self.held.append((number, chunk))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def unpin(self, data):
        number, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.tier.unpin(key(number))
        self.pins[number] -= 1
        self.make_room(self.capacity)

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def touch(self, data):
        prompt = data.draw(st.lists(st.sampled_from(self.order), unique=True, min_size=1))
        self.tier.request(list(map(key, prompt)))
        self.tier.arrange(list(map(key, prompt)))
        self.order = [n for n in self.order if n not in prompt] + prompt[::-1]

    @rule(capacity=st.integers(0, 8))
    def resize(self, capacity):
        grows = capacity >= self.capacity
        before = list(self.order)
        self.tier.resize(capacity)
        self.capacity = capacity
        self.make_room(capacity)
        assert not grows or self.order == before
        assert len(self.order) <= max(capacity, sum(1 for n in self.order if self.pins.get(n)))

    @invariant()
    def holds_what_the_model_holds(self):
        assert set(self.tier) == set(map(key, self.order))
        assert self.tier.evictions == self.evicted
        assert self.tier.pinned_chunks == sum(1 for count in self.pins.values() if count)
        assert self.tier.capacity_chunks == self.capacity

    @invariant()
    def accounted_bytes_are_actual_bytes(self):
        actual = sum(entry.chunk.untyped_storage().nbytes() for entry in self.tier._entries.values())
        assert self.tier.size_bytes == actual

    @invariant()
    def pinned_chunks_are_in_place(self):
        for number, chunk in self.held:
            assert key(number) in self.tier
            assert same_bits(chunk, content(number))


LocalTierAgainstModel.TestCase.settings = settings(LIMITS, max_examples=60, stateful_step_count=40)
TestLocalTierAgainstModel = LocalTierAgainstModel.TestCase


@given(st.integers(1, 6), st.integers(1, 6))
def test_a_prompts_last_chunks_leave_before_its_first(length, capacity):
    tier = LocalTier(length, SHAPE.size_bytes, LRU())
    for number in range(length):
        tier.put(key(number), content(number))
    tier.arrange(list(map(key, range(length))))
    tier.resize(capacity)
    assert set(tier) == set(map(key, range(min(length, capacity))))


def test_room_in_flight_counts_against_what_others_may_have():
    tier = LocalTier(2, SHAPE.size_bytes, LRU())
    with tier.reserve(key(1)) as first, tier.reserve(key(2)) as second, tier.reserve(key(3)) as third:
        assert first is not None
        assert second is not None
        assert third is None
        assert tier.size_bytes == 2 * SHAPE.size_bytes
    assert tier.size_bytes == 0


def test_a_chunk_is_never_overwritten():
    tier = LocalTier(2, SHAPE.size_bytes, LRU())
    assert tier.put(key(1), content(1))
    with pytest.raises(RuntimeError, match="overwritten"):
        tier.put(key(1), content(2))
    assert same_bits(tier.pin(key(1)), content(1))
    assert tier.used_chunks == 1


def test_unpinning_what_is_not_pinned_is_an_error():
    tier = LocalTier(2, SHAPE.size_bytes, LRU())
    tier.put(key(1), content(1))
    with pytest.raises(RuntimeError, match="unpinned"):
        tier.unpin(key(1))


class Refusing(LRU):
    """Admits no key for which another would have to leave."""

    def admits(self, key: bytes) -> bool:
        return False


def test_a_chunk_that_the_policy_refuses_makes_nothing_leave():
    tier = LocalTier(2, SHAPE.size_bytes, Refusing())
    assert tier.put(key(1), content(1))
    assert tier.put(key(2), content(2)), "there was room: nobody had to leave"
    assert not tier.put(key(3), content(3))
    assert set(tier) == {key(1), key(2)}
    assert tier.evictions == 0


class Recording(LRU):
    """Records the capacities it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.capacities: list[int] = []

    def on_resize(self, capacity_chunks: int) -> None:
        self.capacities.append(capacity_chunks)


def test_the_policy_is_told_the_capacity_at_first_and_when_it_changes():
    policy = Recording()
    tier = LocalTier(2, SHAPE.size_bytes, policy)
    for capacity in (2, 5, 5, 0):
        tier.resize(capacity)
    assert policy.capacities == [2, 5, 0]

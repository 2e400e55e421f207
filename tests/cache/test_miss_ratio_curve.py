"""The miss-ratio curve equals the hits of caches of every capacity, approximately when it samples; it is bounded."""

import hashlib
import random
from collections.abc import Iterator

import numpy as np
import pytest
from cache_support import C, given, make_cache, store
from hypothesis import strategies as st

from cache.sizing.miss_ratio_curve import NEVER, MissRatioCurve

GREATEST = 12
heads = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=25)
"""Prompts with one number per chunk. Few numbers, so that prompts share prefixes and return."""


def tokens(prompt: list[int]) -> list[int]:
    return [head for head in prompt for _ in range(C)]


def keys(prompt: list[int]) -> list[bytes]:
    """One key per chunk of a prompt, which depends on all chunks before it."""
    return [hashlib.sha256(bytes(prompt[: end + 1])).digest() for end in range(len(prompt))]


@given(heads)
def test_every_capacity_hits_what_a_cache_of_that_capacity_hits(prompts: list[list[int]]) -> None:
    curve = MissRatioCurve(GREATEST, GREATEST)
    for prompt in prompts:
        curve.look_up(0, keys(prompt))
    expected = []
    for capacity in range(GREATEST + 1):
        cache = make_cache(capacity=capacity)
        for prompt in prompts:
            cache.lookup(tokens(prompt)).release()
            store(cache, tokens(prompt))
        expected.append(cache.stats().local_chunks_hit)
    assert curve.hits(range(GREATEST + 1)).tolist() == expected
    assert curve.accesses == sum(map(len, prompts))


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=4), st.lists(st.integers(0, 1), max_size=3)))
)
def test_answers_take_room_and_are_found_as_in_a_cache(turns: list[tuple[list[int], list[int]]]) -> None:
    curve = MissRatioCurve(GREATEST, GREATEST)
    for prompt, answer in turns:
        curve.look_up(0, keys(prompt))
        curve.put(keys(prompt + answer))
    expected = []
    for capacity in range(GREATEST + 1):
        cache = make_cache(capacity=capacity)
        for prompt, answer in turns:
            cache.lookup(tokens(prompt)).release()
            store(cache, tokens(prompt + answer))
        expected.append(cache.stats().local_chunks_hit)
    assert curve.hits(range(GREATEST + 1)).tolist() == expected
    assert curve.accesses == sum(len(prompt) for prompt, _ in turns)


@given(heads, st.integers(1, 5))
def test_a_short_memory_is_exact_as_far_as_it_reaches(prompts: list[list[int]], greatest: int) -> None:
    short, long = MissRatioCurve(greatest, 100), MissRatioCurve(100, 100)
    for prompt in prompts:
        short.look_up(0, keys(prompt))
        long.look_up(0, keys(prompt))
        assert len(short) <= greatest
    assert short.hits(range(greatest + 1)).tolist() == long.hits(range(greatest + 1)).tolist()


@given(heads)
def test_depths_are_the_least_capacities_that_hit(prompts: list[list[int]]) -> None:
    curve = MissRatioCurve(100, 100)
    stack: list[bytes] = []
    for prompt in prompts:
        looked_up = keys(prompt)
        assert curve.look_up(0, looked_up) == [stack.index(key) + 1 if key in stack else NEVER for key in looked_up]
        stack = looked_up + [key for key in stack if key not in looked_up]


def test_what_was_counted_before_weighs_less_with_age() -> None:
    curve = MissRatioCurve(10, 10)
    for _ in range(5):
        curve.look_up(0, keys([1]))
    curve.age(0.5)
    curve.look_up(0, keys([1, 2]))
    # Half of five and of four; then one access of each kind.
    assert curve.accesses == 4.5
    assert curve.hits([0, 1, 10]).tolist() == [0, 3, 3]


def test_the_time_between_look_ups_ages_too() -> None:
    curve = MissRatioCurve(10, 10)
    for now_ms in (5000, 6000, 9000):
        curve.look_up(now_ms, [])
    assert curve.seconds == 4
    curve.age(0.25)
    curve.look_up(9500, [])
    assert curve.seconds == 1.5


def test_nothing_looked_up_is_nothing_hit() -> None:
    curve = MissRatioCurve(10, 10)
    assert curve.look_up(0, []) == []
    assert curve.hits([0, 10]).tolist() == [0, 0]
    assert MissRatioCurve(0, 64).look_up(0, keys([1, 2])) == [NEVER, NEVER]


def conversations(seed: int, requests: int) -> Iterator[list[bytes]]:
    """Prompts of a shared beginning and a session's own growing chunks; older sessions return less often."""
    dice = random.Random(seed)
    shared = [dice.randbytes(32) for _ in range(8)]
    sessions: list[list[bytes]] = []
    for _ in range(requests):
        if not sessions or dice.random() < 0.1:
            sessions.append([])
        session = sessions[-1 - int(dice.random() ** 2 * len(sessions))]
        session += [dice.randbytes(32) for _ in range(dice.randint(1, 4))]
        yield shared + session[:60]


@pytest.mark.parametrize("seed", range(4))
def test_a_sample_errs_by_little(seed: int) -> None:
    exact, sampled = MissRatioCurve(8000, 8000), MissRatioCurve(8000, 1000)
    assert (exact.rate, sampled.rate) == (1.0, 0.125)
    for looked_up in conversations(seed, 2500):
        exact.look_up(0, looked_up)
        sampled.look_up(0, looked_up)
    capacities = range(0, 8001, 50)
    error = np.abs(sampled.hits(capacities) - exact.hits(capacities)) / exact.accesses
    assert error.max() < 0.06
    assert error.mean() < 0.02
    # The test can fail: the curve rises over most of its length.
    assert exact.hits([8000])[0] > 1.3 * exact.hits([500])[0] > 0


@pytest.mark.parametrize("greatest", [200, 1000])
def test_memory_is_bounded(greatest: int) -> None:
    curve = MissRatioCurve(greatest, 200)
    places = len(curve._tree)
    assert places <= 2 * 200 * 2
    for looked_up in conversations(1, 2000):
        curve.look_up(0, looked_up)
        assert len(curve) <= 200
        assert len(curve._pending) <= 5000
        assert len(curve._tree) == places
    assert len(curve) == 200


@given(heads)
def test_hits_rise_with_the_capacity_and_stay_below_the_accesses(prompts: list[list[int]]) -> None:
    curve = MissRatioCurve(1000, 64)
    for prompt in prompts:
        curve.look_up(0, keys(prompt))
    hits = curve.hits(range(0, 1001, 10))
    assert (np.diff(hits) >= 0).all()
    assert hits[0] == 0
    assert hits[-1] <= curve.accesses

"""Fetch or prefill, computed by hand: chunks of 10 tokens, records of 1000 bytes, a deadline of 100 ms."""

import pytest

from cache.fetch_plan import FetchPlan
from cache.write_behind import KnownKeys
from core.clock import ManualClock


@pytest.fixture
def plan():
    return FetchPlan(chunk_tokens=10, record_bytes=1000, deadline_ms=100)


def test_without_experience_all_is_fetched(plan):
    assert plan.begin(7, 0.001)
    assert plan.chunks_to_fetch(7, 0.001) == 7


def test_fetches_where_the_transfer_is_cheaper_than_the_prefill(plan):
    plan.observe_round_trip(5)
    plan.observe_transfer(1000, 6)  # a round trip and 1 ms
    # Four chunks: 2 * 5 + 4 = 14 ms; their prefill: 40 tokens.
    assert plan.begin(4, 0.36)
    assert plan.chunks_to_fetch(4, 0.36) == 4
    assert not plan.begin(4, 0.34)
    # One chunk alone is not worth the round trips, though four are.
    assert plan.chunks_to_fetch(1, 0.36) == 0


def test_fetches_no_more_than_fits_the_deadline(plan):
    plan.observe_round_trip(5)
    plan.observe_transfer(1000, 15)  # 10 ms a chunk: (80 - 2 * 5) / 10
    assert plan.chunks_to_fetch(20, None) == 7


def test_averages_follow(plan):
    plan.observe_round_trip(10)
    plan.observe_round_trip(20)
    assert plan.round_trip_ms == pytest.approx(0.7 * 10 + 0.3 * 20)
    plan.observe_transfer(1000, 13 + 1)
    plan.observe_transfer(1000, 13 + 2)
    assert plan.ms_per_byte == pytest.approx((0.7 * 1 + 0.3 * 2) / 1000)


def test_a_bad_average_is_tried_again_and_given_up(plan):
    plan.observe_round_trip(1000)
    assert [plan.begin(8, 1.0) for _ in range(32)] == ([False] * 15 + [True]) * 2
    assert plan.chunks_to_fetch(8, 1.0) == 4
    plan.observe_round_trip(1)
    plan.observe_transfer(4000, 2)
    assert plan.round_trip_ms == 1
    assert plan.begin(8, 1.0)
    assert plan.chunks_to_fetch(8, 1.0) == 8


def test_known_keys_are_bounded_and_expire():
    clock = ManualClock()
    known = KnownKeys(100, clock, limit=2)
    for name in (b"a", b"b", b"c"):
        known.add(name)
    assert [name in known for name in (b"a", b"b", b"c")] == [False, True, True]
    assert len(known) == 2
    known.discard(b"b")
    known.discard(b"b")
    assert b"b" not in known
    clock.advance(99)
    assert b"c" in known
    clock.advance(1)
    assert b"c" not in known

"""MRC: examples by hand, its limits, and a cost close to that of the best fixed capacity for its target."""

import math

import pytest
from cache_support import given
from hypothesis import strategies as st
from sizing_loads import Hindsight, Load, bursts, outcome, phases, replay

from cache.config import MrcGoal, SizingConfig
from cache.registry import SIZING
from cache.sizing import make_sizing
from cache.sizing.mrc import MRC


def config(**changes: object) -> SizingConfig:
    """A configuration that decides at every tenth request, without history."""
    values = {
        "strategy": "MRC",
        "capacity_chunks": 20,
        "min_capacity_chunks": 0,
        "max_capacity_chunks": 200,
        "adjust_every_requests": 10,
        "mrc_warmup_requests": 0,
        "mrc_catch_up": 0.0,
        "mrc_dwell_ms": 0.0,
        "mrc_grow_factor": 1000.0,
        "mrc_shrink_factor": 1000.0,
    }
    return SizingConfig(**(values | changes))


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def round_of(policy: MRC, distinct: int, requests: int = 10, start_ms: float = 0.0, every_ms: float = 1000.0) -> int:
    """Look up all keys in turn, so that the stack depth of each is the number of keys."""
    for request in range(requests):
        now_ms = start_ms + request * every_ms
        policy.observe(now_ms, [key(number) for number in range(distinct)])
    return policy.capacity_chunks


def test_the_smallest_capacity_that_reaches_the_target() -> None:
    policy = MRC(config(mrc_target_hit_rate=0.45))
    # Ten lookups of 8 keys: the first misses all; the keys are at depths 1 to 8, so each further chunk gains 9 hits.
    assert round_of(policy, 8) == 4  # 36 of 80.


def test_a_target_out_of_reach_takes_what_is_worth_its_price() -> None:
    # 90 % is the most. 9 hits in 9 s for each of the first 8 chunks.
    assert round_of(MRC(config(mrc_target_hit_rate=0.95, mrc_price=0.99)), 8) == 8
    assert round_of(MRC(config(mrc_target_hit_rate=0.95, mrc_price=1.01)), 8) == 0


def test_a_price_is_paid_for_whatever_the_hit_rate() -> None:
    for target in (0.01, 0.99):
        priced = config(mrc_goal=MrcGoal.PRICE, mrc_target_hit_rate=target, mrc_price=0.5)
        assert round_of(MRC(priced), 8) == 8
        assert round_of(MRC(priced), 8, every_ms=3000) == 0


def test_hits_too_few_are_made_up_for_and_hits_above_the_target_are_spent() -> None:
    patient = MRC(config(mrc_target_hit_rate=0.5, capacity_chunks=1, mrc_grow_factor=8.0))
    hasty = MRC(config(mrc_target_hit_rate=0.5, capacity_chunks=1, mrc_catch_up=1.0))
    # 5 chunks would have hit 45 of 80. But only 8 of the 72 before the last lookup were hits, so 28 more are missing.
    assert round_of(patient, 8) == 5
    assert round_of(hasty, 8) == 8
    spent = MRC(config(mrc_target_hit_rate=0.5, mrc_catch_up=1.0))
    # 72 of 80 are found when the eleventh lookup begins, 32 more than the target.
    assert round_of(spent, 8, requests=20) < 5


def test_the_curve_forgets() -> None:
    policy = MRC(config(mrc_target_hit_rate=0.8, mrc_half_life_requests=10))
    assert round_of(policy, 60, requests=50) > 40
    assert round_of(policy, 10, requests=50, start_ms=50_000) <= 10


def test_a_step_is_bounded_up_and_down() -> None:
    policy = MRC(config(mrc_target_hit_rate=0.8, mrc_grow_factor=2.0, mrc_shrink_factor=1.25))
    assert [round_of(policy, 150, start_ms=10_000 * n) for n in range(3)] == [40, 80, 124]
    lower = MRC(config(mrc_target_hit_rate=0.8, mrc_shrink_factor=1.25))
    assert [round_of(lower, 5, start_ms=10_000 * n) for n in range(3)] == [16, 12, 9]


def test_it_stays_where_it_is_about_right() -> None:
    assert round_of(MRC(config(mrc_target_hit_rate=0.8, mrc_hysteresis=0.3)), 20) == 20  # 18 are enough.
    assert round_of(MRC(config(mrc_target_hit_rate=0.8, mrc_hysteresis=0.05)), 20) == 18


def test_shrinking_waits_and_growing_does_not() -> None:
    policy = MRC(config(mrc_target_hit_rate=0.8, mrc_half_life_requests=1, mrc_dwell_ms=15_000))
    assert round_of(policy, 50) > 40
    assert round_of(policy, 100, start_ms=10_000) > 80
    grown = policy.capacity_chunks
    assert round_of(policy, 10, start_ms=20_000) == grown
    assert round_of(policy, 10, start_ms=30_000) < 12


def test_nothing_leaves_at_the_beginning() -> None:
    policy = MRC(config(mrc_warmup_requests=6, capacity_chunks=3, max_capacity_chunks=9))
    grown = [policy.observe(0, [key(2 * n), key(2 * n + 1)]) for n in range(9)]
    assert grown == [3, 4, 6, 8, 9, 9, 9, 9, 9]


def test_a_beginning_without_accesses_decides_nothing() -> None:
    assert round_of(MRC(config()), 0, requests=40) == 0
    assert round_of(MRC(config(min_capacity_chunks=7)), 0, requests=40) == 7


@given(
    st.lists(st.tuples(st.floats(0, 5000), st.lists(st.integers(0, 300), max_size=40, unique=True)), max_size=60),
    st.sampled_from(MrcGoal),
    st.booleans(),
)
def test_capacity_and_memory_stay_within_their_bounds(
    requests: list[tuple[float, list[int]]], goal: MrcGoal, sampled: bool
) -> None:
    policy = make_sizing(
        SizingConfig(
            strategy="MRC",
            capacity_chunks=20,
            min_capacity_chunks=10,
            max_capacity_chunks=500 if sampled else 50,
            adjust_every_requests=3,
            mrc_goal=goal,
            mrc_tracked_chunks=64,
        )
    )
    assert isinstance(policy, MRC)
    now_ms = 0.0
    for gap_ms, numbers in requests:
        now_ms += gap_ms
        capacity = policy.observe(now_ms, [key(number) for number in numbers])
        assert 10 <= capacity == policy.capacity_chunks <= (500 if sampled else 50)
        assert policy.tracked_chunks <= 64


@pytest.mark.parametrize("answer_tokens", [0, 40])
def test_it_knows_what_its_cache_has_hit(answer_tokens: int) -> None:
    # Missing hits are never forgotten, so they include all hits.
    sizing = config(max_capacity_chunks=500, mrc_shrink_factor=1.3, mrc_warmup_requests=20, mrc_horizon_requests=1e12)
    policy = MRC(sizing)
    stats = replay(policy, phases(200, 0), answer_tokens)
    hits = sizing.mrc_target_hit_rate * stats.chunks_looked_up - policy._owed
    assert hits == pytest.approx(stats.local_chunks_hit)
    assert stats.evictions > 100


POINT = 0.01
LOADS = {
    "phases, short": phases(200, 0),
    "phases, short, another seed": phases(200, 2),
    "phases": phases(2000, 0),
    "bursts, short": bursts(300, 0),
    "bursts": bursts(1500, 0),
    "bursts, another seed": bursts(1500, 1),
}


def reaching(target: float) -> SizingConfig:
    return SizingConfig(strategy="MRC", mrc_target_hit_rate=target, max_capacity_chunks=2048)


@pytest.mark.parametrize("share", [0.9, 0.95])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_the_target_is_reached_at_about_the_price_of_the_best_fixed_capacity(load: Load, share: float) -> None:
    hindsight = Hindsight(load)
    target = share * hindsight.attainable
    reached = outcome(reaching(target), load)
    assert reached.hit_rate > target - POINT
    assert reached.mean_chunks < 1.15 * hindsight.smallest(target)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_no_other_policy_reaches_it_for_less(load: Load) -> None:
    target = 0.9 * Hindsight(load).attainable
    reached = outcome(reaching(target), load)
    for strategy in set(SIZING) - {"MRC"}:
        other = outcome(SizingConfig(strategy=strategy, max_capacity_chunks=2048), load)
        assert other.hit_rate < target - POINT or other.mean_chunks > reached.mean_chunks, strategy


def test_a_sample_sizes_as_all_keys_do() -> None:
    load = bursts(1500, 1)
    target = 0.9 * Hindsight(load).attainable
    sampled = outcome(reaching(target).model_copy(update={"mrc_tracked_chunks": 512}), load)
    assert sampled.hit_rate == pytest.approx(target, abs=0.03)
    assert math.isclose(sampled.mean_chunks, outcome(reaching(target), load).mean_chunks, rel_tol=0.2)

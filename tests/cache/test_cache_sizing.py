"""The sizing policies: examples computed by hand, then properties for any input."""

import contextlib
import io

import pytest
from cache_support import given, in_another_process
from hypothesis import strategies as st
from sizing_contract import check_bounds, config, key, loads

from cache.registry import SIZING
from cache.sizing import make_sizing
from cache.sizing.fluid import Fluid
from cache.sizing.frequency import Frequency


def fluid_after(policy: Fluid, start_ms: float, every_ms: float, count: int = 15) -> int:
    for i in range(count):
        capacity = policy.observe(start_ms + i * every_ms, [])
    return capacity


@pytest.mark.parametrize("strategy", list(SIZING))
def test_the_first_capacity(strategy):
    assert make_sizing(config(strategy)).capacity_chunks == 100
    above = make_sizing(config(strategy, capacity_chunks=5000)).capacity_chunks
    below = make_sizing(config(strategy, capacity_chunks=0)).capacity_chunks
    assert (below, above) == ((0, 5000) if strategy == "STATIC" else (10, 1000))


def test_static_never_moves():
    policy = make_sizing(config("STATIC"))
    assert {policy.observe(i / 100, [key(i)]) for i in range(500)} == {100}


def test_fluid_first_decision_only_sets_the_average_then_grows_and_shrinks():
    policy = Fluid(config("FLUID"))
    # 15 requests over 1400 ms: 15 / 1.4 s = 10.71 a second.
    assert fluid_after(policy, 0, 100) == 100
    # Ten seconds later 15 requests over 700 ms, taken as one second: 15 > 1.35 * 10.71 = 14.46. 100 * 1.25.
    assert fluid_after(policy, 10_000, 50) == 125
    # h = 0.7 * 10.714 + 0.3 * 15 = 12.0. 15 requests over 2800 ms: 5.36 < 0.65 * 12.0 = 7.8. 125 / 1.15 = 108.7.
    assert fluid_after(policy, 20_000, 200) == 108
    # h = 0.7 * 12.0 + 0.3 * 5.357 = 10.007; 15 / 1.4 s = 10.71 lies between 6.5 and 13.5.
    assert fluid_after(policy, 30_000, 100) == 108


def test_fluid_compares_with_the_average_as_it_was():
    policy = Fluid(config("FLUID"))
    fluid_after(policy, 0, 100)  # h = 10.714
    # 15 against 1.35 * 10.714 = 14.46 grows; against the updated 1.35 * 12.0 = 16.2 it would not.
    assert fluid_after(policy, 10_000, 10) == 125


def test_fluid_counts_only_the_window():
    policy = Fluid(config("FLUID"))
    fluid_after(policy, 0, 100)
    # One request a second: in the last 3000 ms there are four, over 3 s.
    assert fluid_after(policy, 10_000, 1000) == 86  # 4/3 < 0.65 * 10.7; 100 / 1.15 = 86.96


def test_fluid_decides_at_every_fifteenth_request():
    policy = Fluid(config("FLUID"))
    fluid_after(policy, 0, 100)
    capacities = [policy.observe(10_000 + i * 10, []) for i in range(15)]
    assert capacities == [100] * 14 + [125]


def frequency_after(policy: Frequency, accesses: list[bytes]) -> int:
    """One decision: fourteen empty lookups, then one with all accesses."""
    for _ in range(14):
        policy.observe(0, [])
    return policy.observe(0, accesses)


def test_frequency_takes_whole_buckets_by_accesses_per_key():
    policy = Frequency(config("FREQUENCY", min_capacity_chunks=0))
    accesses = (
        [key(n, 0) for n in range(2)] * 40  # 80 accesses of 2 keys: 40 a key
        + [key(n, 1) for n in range(6)] * 2  # 12 of 6: 2 a key
        + [key(n, 2) for n in range(8)]  # 8 of 8: 1 a key
    )
    # 80 of 100 are not 90; 92 are: 2 + 6 keys.
    assert frequency_after(policy, accesses) == 8


def test_frequency_covers_exactly_the_share():
    policy = Frequency(config("FREQUENCY", min_capacity_chunks=0))
    accesses = [key(0, 0)] * 9 + [key(0, 1)]
    assert frequency_after(policy, accesses) == 1  # 9 of 10 are 0.9.


def test_frequency_forgets_what_left_the_window():
    policy = Frequency(config("FREQUENCY", min_capacity_chunks=0, frequency_window_accesses=50))
    assert frequency_after(policy, [key(n, n % 4) for n in range(50)]) > 30
    assert frequency_after(policy, [key(7, 1)] * 50) == 1
    assert policy.remembered_accesses == 50


def test_frequency_without_accesses_keeps_its_capacity():
    assert frequency_after(Frequency(config("FREQUENCY")), []) == 100


def test_frequency_does_not_depend_on_the_hash_seed():
    script = (
        "import hashlib; from cache.config import SizingConfig; from cache.sizing import make_sizing\n"
        "config = SizingConfig(strategy='FREQUENCY', min_capacity_chunks=0, frequency_coverage=0.5)\n"
        "policy = make_sizing(config.model_copy(update={'frequency_buckets': 20}))\n"
        "keys = [hashlib.sha256(bytes([j])).digest() for j in range(200)]\n"
        "print([policy.observe(0, keys[: i * i % 199]) for i in range(300)])"
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(script, {})
    assert in_another_process(script) == printed.getvalue().strip()


@pytest.mark.parametrize("strategy", list(SIZING))
@given(requests=loads)
def test_capacity_stays_within_bounds_and_moves_only_at_decisions(strategy, requests):
    check_bounds(strategy, requests)


@given(st.lists(st.lists(st.integers(0, 20), max_size=30), max_size=40))
def test_frequency_counts_match_a_recount_of_the_window(requests):
    policy = Frequency(config("FREQUENCY", frequency_window_accesses=50, min_capacity_chunks=0))
    accesses: list[bytes] = []
    for numbers in requests:
        policy.observe(0, [key(n, n % 4) for n in numbers])
        accesses += [key(n, n % 4) for n in numbers]
    window = accesses[-50:]
    fresh = Frequency(config("FREQUENCY", min_capacity_chunks=0))
    fresh.observe(0, window)
    assert policy.remembered_accesses == len(window)
    assert policy._accesses == fresh._accesses
    assert policy._distinct == fresh._distinct
    assert len(policy._accesses_of_key) == len(set(window))

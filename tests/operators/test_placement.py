"""Sessions stay at their slots, and each slot has a key that leads to it."""

from itertools import islice
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.default_slot import default_slot
from operators.config import PlacementConfig
from operators.placement import BalancedPlacement, SessionAffinity, key_of_each_slot


@given(st.text(min_size=1), st.integers(1, 16))
def test_a_session_stays_at_one_slot(session: str, slots: int) -> None:
    slot = SessionAffinity(slots).slot_of(session)
    assert 0 <= slot < slots
    assert SessionAffinity(slots).slot_of(session) == slot


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_sessions_spread_over_all_slots(slots: int) -> None:
    placement = SessionAffinity(slots)
    counts = [0] * slots
    for number in range(1000):
        counts[placement.slot_of(f"user-{number % 40}/s{number}")] += 1
    assert min(counts) > 0.8 * 1000 / slots


def test_the_slot_of_a_session_is_the_same_in_every_release() -> None:
    """The expected slots are fixed values: a change would move running conversations away from their chunks."""
    assert [SessionAffinity(4).slot_of(f"s{number}") for number in range(6)] == [2, 1, 2, 0, 3, 0]


@given(st.integers(1, 64), st.integers(0, 1 << 32))
def test_each_slot_gets_a_key_that_leads_to_it(slots: int, seed: int) -> None:
    rule = {key: Random(seed + key).randrange(slots) for key in range(1 << 12)}
    for slot in range(slots):
        rule[(1 << 12) + slot] = slot
    keys = key_of_each_slot(rule.__getitem__, slots, max_tries=len(rule))
    assert [rule[key] for key in keys] == list(range(slots))


def test_a_rule_that_never_reaches_a_slot_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 slots"):
        key_of_each_slot(lambda key: key % 2, 3, max_tries=100)


class KnownLoads:
    """Loads set by a test."""

    def __init__(self, **queues_ms: float) -> None:
        self.queues_ms: dict[int, float] = {}
        self.say(**queues_ms)

    def say(self, **queues_ms: float) -> None:
        self.queues_ms = {int(slot.removeprefix("s")): queue for slot, queue in queues_ms.items()}


def default_at(slot: int, slots: int, count: int = 1) -> list[str]:
    """Sessions whose default slot is `slot`."""
    found = (f"u{number}" for number in range(10_000) if default_slot(f"u{number}", slots) == slot)
    return list(islice(found, count))


def balanced(loads: KnownLoads, slots: int = 2, **options: int) -> BalancedPlacement:
    return BalancedPlacement(slots, PlacementConfig(overload_ms=500, overload_ratio=2, **options), loads)


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_sessions_are_default_at_as_long_as_no_queue_stands_out(slots: int) -> None:
    placements = [
        balanced(KnownLoads(), slots),
        balanced(KnownLoads(**{f"s{slot}": 9000.0 for slot in range(slots)}), slots),
    ]
    for number in range(200):
        for placement in placements:
            assert placement.slot_of(f"u{number}") == SessionAffinity(slots).slot_of(f"u{number}")


def test_a_new_session_goes_around_an_overloaded_default_slot_and_an_old_one_stays() -> None:
    loads = KnownLoads(s0=0.0, s1=0.0)
    placement = balanced(loads)
    old, new = default_at(0, 2, 2)
    assert placement.slot_of(old) == 0
    loads.say(s0=3000.0, s1=100.0)
    assert placement.slot_of(old) == 0
    assert placement.slot_of(new) == 1
    loads.say(s0=0.0, s1=3000.0)
    assert placement.slot_of(new) == 1


@pytest.mark.parametrize(("default", "other"), [(500.0, 0.0), (1900.0, 1000.0), (3000.0, 3000.0)])
def test_a_queue_that_is_short_or_hardly_longer_than_the_others_is_no_overload(default: float, other: float) -> None:
    assert balanced(KnownLoads(s0=default, s1=other)).slot_of(default_at(0, 2)[0]) == 0


def test_between_two_reports_not_all_are_sent_to_one_slot() -> None:
    placement = balanced(KnownLoads(s0=9000.0, s1=0.0, s2=50.0), slots=3)
    found = [placement.slot_of(session) for session in default_at(0, 3, 8)]
    assert found == [1, 2, 1, 2, 1, 2, 1, 2]


def test_a_slot_that_has_said_nothing_is_not_gone_to_nor_left() -> None:
    assert balanced(KnownLoads(s1=0.0)).slot_of(default_at(0, 2)[0]) == 0
    assert balanced(KnownLoads(s0=9000.0)).slot_of(default_at(0, 2)[0]) == 0


def test_a_session_that_is_long_forgotten_begins_anew() -> None:
    loads = KnownLoads(s0=9000.0, s1=0.0)
    placement = balanced(loads, remembered_sessions=2)
    first, second, third = default_at(0, 2, 3)
    assert placement.slot_of(first) == 1
    loads.say(s0=0.0, s1=0.0)
    assert [placement.slot_of(session) for session in (first, second, first, third)] == [1, 0, 1, 0]
    # `second` is the session without requests for longest.
    loads.say(s0=9000.0, s1=0.0)
    assert placement.slot_of(second) == 1

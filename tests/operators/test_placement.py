"""Sessions stay, and every slot has a key that leads to it."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from operators.placement import SessionAffinity, key_of_each_slot


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
    """Written down: a change would send running conversations away from their chunks."""
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

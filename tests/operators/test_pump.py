"""Requests come and go while the slot steps. Each answer reaches the owner of its request once."""

import threading
import time
from collections.abc import Iterator

import pytest

from core.clock import ManualClock
from operators.envelope import Answer, RecordPosition
from operators.slots.pump import Pump
from tests.experiments.experiment_samples import response
from tests.operators.answers import response_of
from tests.operators.stand_in_slot import GatedSlot, envelope, letter

WAIT_S = 20.0
"""Time limit of waits, which only a failure reaches."""


@pytest.fixture
def slot() -> GatedSlot:
    return GatedSlot()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1000.0)


@pytest.fixture
def pump(slot: GatedSlot, clock: ManualClock) -> Iterator[Pump]:
    made = Pump(slot, max_in_flight=3, clock=clock)
    yield made
    made.close()


def hand_in(pump: Pump, *numbers: int, owner: int = 1) -> None:
    for number in numbers:
        pump.submit(owner, envelope(number))


def taken(pump: Pump, count: int, owner: int = 1) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        answers = pump.take(owner, WAIT_S)
        assert answers, f"only {found} came"
        for answer in answers:
            assert answer == Answer(answer.position, letter(envelope(answer.position.offset)))
            found.append(answer.position.offset)
    return found


def test_each_leaves_when_it_is_done_and_not_with_the_others(pump: Pump, slot: GatedSlot) -> None:
    hand_in(pump, 1, 2, 3)
    slot.let_go(2)
    assert taken(pump, 1) == [2]
    assert pump.outstanding(1) == 2
    slot.let_go(1, 3)
    assert sorted(taken(pump, 2)) == [1, 3]
    assert pump.outstanding(1) == 0
    assert pump.take(1) == []


def test_a_request_reaches_the_slot_at_once_while_others_run(pump: Pump, slot: GatedSlot) -> None:
    hand_in(pump, 1)
    assert pump.take(1) == []
    hand_in(pump, 2)
    assert slot.sent == [1, 2]
    slot.let_go(2)
    assert taken(pump, 1) == [2]


def test_there_is_no_room_at_the_cap_until_one_is_done(pump: Pump, slot: GatedSlot) -> None:
    assert pump.wait_for_capacity(0.0)
    hand_in(pump, 1, 2, 3)
    assert not pump.wait_for_capacity(0.01)
    slot.let_go(3)
    # Capacity is free when a request is answered, not when its answer is collected.
    assert pump.wait_for_capacity(WAIT_S)
    hand_in(pump, 4)
    assert not pump.wait_for_capacity(0.0)


def test_a_slow_slot_has_room_for_one_after_the_wait_for_more(slot: GatedSlot, clock: ManualClock) -> None:
    pump = Pump(slot, max_in_flight=9, clock=clock, rows=1)
    hand_in(pump, *range(9))
    assert not pump.wait_for_capacity(0.01)
    slot.let_go(3)
    assert taken(pump, 1) == [3]
    # Four would have to be done for the wait to end early.
    assert pump.wait_for_capacity(0.01)
    hand_in(pump, 9)
    assert not pump.wait_for_capacity(0.01)
    slot.let_go(4, 5, 6, 7)
    assert pump.wait_for_capacity(WAIT_S)
    pump.close()


def test_in_flight_is_what_is_unanswered_and_outstanding_what_is_not_taken_out(pump: Pump, slot: GatedSlot) -> None:
    assert (pump.in_flight, pump.outstanding(1)) == (0, 0)
    hand_in(pump, 1, 2)
    hand_in(pump, 3, owner=2)
    assert (pump.in_flight, pump.outstanding(1), pump.outstanding(2)) == (3, 2, 1)
    slot.let_go(2)
    assert pump.wait_for_capacity(WAIT_S)
    assert (pump.in_flight, pump.outstanding(1), pump.outstanding(2)) == (2, 2, 1)
    assert taken(pump, 1) == [2]
    assert (pump.in_flight, pump.outstanding(1), pump.outstanding(2)) == (2, 1, 1)


def test_answers_are_kept_apart_by_owner(pump: Pump, slot: GatedSlot) -> None:
    hand_in(pump, 1, owner=7)
    hand_in(pump, 2, owner=8)
    slot.let_go(1, 2)
    assert taken(pump, 1, owner=8) == [2]
    assert (pump.outstanding(7), pump.outstanding(8)) == (1, 0)
    assert taken(pump, 1, owner=7) == [1]


def test_an_answer_bears_the_time_at_which_it_is_taken_out(pump: Pump, slot: GatedSlot, clock: ManualClock) -> None:
    finished = response(created_at_ms=400.0, e2e_ms=500.0)
    slot.responses = {1: finished, 2: finished}
    hand_in(pump, 1, 2, 3)
    slot.let_go(1)
    assert pump.wait_for_capacity(WAIT_S)
    clock.advance(250.0)
    (first,) = pump.take(1)
    assert first.position == RecordPosition("t", 0, 1)
    assert response_of(first) == finished.model_copy(update={"completed_at_ms": 1250.0, "e2e_ms": 850.0})
    clock.advance(50.0)
    slot.let_go(2)
    (second,) = pump.take(1, WAIT_S)
    assert second.position == RecordPosition("t", 0, 2)
    assert response_of(second) == finished.model_copy(update={"completed_at_ms": 1300.0, "e2e_ms": 900.0})


def test_a_slot_that_fails_is_told_to_every_caller(pump: Pump, slot: GatedSlot) -> None:
    hand_in(pump, 1)
    slot.fail(OSError("device lost"))
    with pytest.raises(RuntimeError, match="the slot failed: device lost") as raised:
        pump.take(1, WAIT_S)
    assert isinstance(raised.value.__cause__, OSError)
    with pytest.raises(RuntimeError, match="device lost"):
        hand_in(pump, 2)
    with pytest.raises(RuntimeError, match="device lost"):
        pump.wait_for_capacity(WAIT_S)
    assert slot.sent == [1]


def test_who_waits_at_the_cap_is_told_that_the_slot_failed(pump: Pump, slot: GatedSlot) -> None:
    hand_in(pump, 1, 2, 3)
    failing = threading.Timer(0.05, slot.fail, [OSError("device lost")])
    failing.start()
    with pytest.raises(RuntimeError, match="device lost"):
        pump.wait_for_capacity(WAIT_S)
    failing.join()


def retried(pump: Pump, owner: int) -> list[tuple[int, int]]:
    """Wait for retries, and return their offsets and attempts."""
    deadline_s = time.monotonic() + WAIT_S
    while not (found := pump.retried(owner)):
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    return [(one.position.offset, one.attempts) for one in found]


def test_what_is_asked_again_is_told_to_its_owner_once(pump: Pump, slot: GatedSlot) -> None:
    hand_in(pump, 1, 2)
    hand_in(pump, 3, owner=2)
    slot.ask_again(2, 3)
    assert retried(pump, 1) == [(2, 1)]
    assert retried(pump, 2) == [(3, 1)]
    assert pump.retried(1) == pump.retried(2) == []
    slot.ask_again(2)
    assert retried(pump, 1) == [(2, 2)]
    assert (pump.in_flight, pump.outstanding(1)) == (3, 2)
    slot.let_go(2)
    assert [answer.position.offset for answer in pump.take(1, WAIT_S)] == [2]


def test_what_has_been_answered_is_not_told_as_asked_again(pump: Pump, slot: GatedSlot) -> None:
    hand_in(pump, 1, 2)
    slot.ask_again(1, 2)
    slot.let_go(1)
    assert [answer.position.offset for answer in pump.take(1, WAIT_S)] == [1]
    assert retried(pump, 1) == [(2, 1)]


def test_closing_ends_the_slot_and_the_thread_in_the_midst_of_work(slot: GatedSlot, clock: ManualClock) -> None:
    pump = Pump(slot, max_in_flight=3, clock=clock)
    hand_in(pump, 1, 2)
    pump.close()
    assert not pump._thread.is_alive()
    with pytest.raises(RuntimeError, match="the slot was ended"):
        pump.take(1, WAIT_S)

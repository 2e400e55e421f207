"""Requests come and go while the engine steps; each answer reaches whoever handed its request in, once."""

import threading
from collections.abc import Iterator

import pytest

from core.records import DeadLetter
from operators.envelope import Envelope, Source
from operators.pump import Pump
from operators.slot import Finished

WAIT_S = 20.0
"""Never reached unless something is wrong."""


class GatedSlot:
    """Finishes, in a step, what it was told to let go; `refuse` are answered when they are handed in."""

    threads = 1

    def __init__(self) -> None:
        self.running: dict[int, Envelope] = {}
        self.refuse: set[int] = set()
        self.fault: Exception | None = None
        self.steps = 0
        self._gate = threading.Condition()
        self._let_go: set[int] = set()

    @property
    def unfinished(self) -> int:
        return len(self.running)

    def submit(self, envelope: Envelope) -> Finished | None:
        if envelope.source.offset in self.refuse:
            return Finished(envelope, letter(envelope))
        self.running[envelope.source.offset] = envelope
        return None

    def let_go(self, *offsets: int) -> None:
        with self._gate:
            self._let_go.update(offsets)
            self._gate.notify_all()

    def step(self) -> list[Finished]:
        with self._gate:
            self._gate.wait(0.005)
            if self.fault is not None:
                raise self.fault
            self.steps += 1
            gone = self._let_go & set(self.running)
            self._let_go -= gone
        return [Finished(one, letter(one)) for one in (self.running.pop(offset) for offset in sorted(gone))]

    def written(self, finished: Finished) -> DeadLetter:
        assert isinstance(finished.outcome, DeadLetter)
        return finished.outcome


def letter(envelope: Envelope) -> DeadLetter:
    return DeadLetter.of(envelope.raw, "echo", stage="inference", topic="t", partition=0, offset=envelope.source.offset)


def envelope(number: int) -> Envelope:
    return Envelope(0, b"r%d" % number, Source("t", 0, number), 0.0)


@pytest.fixture
def slot() -> GatedSlot:
    return GatedSlot()


@pytest.fixture
def pump(slot: GatedSlot) -> Iterator[Pump]:
    made = Pump(slot, max_in_flight=3)  # type: ignore[arg-type]
    yield made
    made.close()


def hand_in(pump: Pump, *numbers: int, owner: int = 1) -> None:
    for number in numbers:
        pump.submit(owner, f"t{number}", envelope(number))


def taken(pump: Pump, count: int, owner: int = 1) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        answers = pump.take(owner, WAIT_S)
        assert answers, f"only {found} came"
        for answer in answers:
            assert isinstance(answer.record, DeadLetter)
            assert answer.ticket == f"t{answer.record.offset}"
            found.append(answer.ticket)
    return found


def test_each_leaves_when_it_is_done_and_not_with_the_others(pump: Pump, slot: GatedSlot) -> None:
    hand_in(pump, 1, 2, 3)
    slot.let_go(2)
    assert taken(pump, 1) == ["t2"]
    assert pump.outstanding(1) == 2
    slot.let_go(1, 3)
    assert sorted(taken(pump, 2)) == ["t1", "t3"]
    assert pump.outstanding(1) == 0
    assert pump.take(1) == []


def test_a_request_joins_while_others_run(pump: Pump, slot: GatedSlot) -> None:
    hand_in(pump, 1)
    while slot.steps < 3:
        assert pump.take(1) == []
    hand_in(pump, 2)
    slot.let_go(2)
    assert taken(pump, 1) == ["t2"]


def test_there_is_no_room_at_the_cap_until_one_is_done(pump: Pump, slot: GatedSlot) -> None:
    assert pump.wait_for_room(0.0)
    hand_in(pump, 1, 2, 3)
    assert not pump.wait_for_room(0.01)
    slot.let_go(3)
    # Room is made when one is answered, not when its answer is taken out.
    assert pump.wait_for_room(WAIT_S)
    hand_in(pump, 4)
    assert not pump.wait_for_room(0.0)


def test_answers_are_kept_apart_by_owner(pump: Pump, slot: GatedSlot) -> None:
    hand_in(pump, 1, owner=7)
    hand_in(pump, 2, owner=8)
    slot.let_go(1, 2)
    assert taken(pump, 1, owner=8) == ["t2"]
    assert (pump.outstanding(7), pump.outstanding(8)) == (1, 0)
    assert taken(pump, 1, owner=7) == ["t1"]


def test_what_the_model_cannot_answer_leaves_though_nothing_runs(pump: Pump, slot: GatedSlot) -> None:
    slot.refuse.add(5)
    hand_in(pump, 5)
    assert taken(pump, 1) == ["t5"]
    assert pump.wait_for_room(0.0)


def test_an_engine_that_raises_is_told_to_every_caller(pump: Pump, slot: GatedSlot) -> None:
    hand_in(pump, 1)
    slot.fault = OSError("device lost")
    with pytest.raises(RuntimeError, match="the engine failed") as raised:
        pump.take(1, WAIT_S)
    assert isinstance(raised.value.__cause__, OSError)
    with pytest.raises(RuntimeError):
        hand_in(pump, 2)
    with pytest.raises(RuntimeError):
        pump.wait_for_room(WAIT_S)


def test_closing_ends_the_thread_in_the_midst_of_work(slot: GatedSlot) -> None:
    pump = Pump(slot, max_in_flight=3)  # type: ignore[arg-type]
    hand_in(pump, 1, 2)
    pump.close()
    assert not pump._thread.is_alive()

"""A slot without a process and an engine. The test decides when it answers, and when it dies."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

from core.clock import Clock
from core.records import DeadLetter, Response
from operators.config import JobConfig
from operators.envelope import Answer, Envelope, Ready, RecordPosition, WrittenResponse
from operators.metrics.slot_metrics import SlotMetrics
from operators.slots.pump import Pump
from operators.slots.retry_tracker import Retry

WAIT_S = 20.0
"""Time limit of waits, which only a failure reaches."""


def envelope(number: int) -> Envelope:
    return Envelope(0, b"r%d" % number, RecordPosition("t", 0, number), 0.0)


def letter(envelope: Envelope) -> DeadLetter:
    return DeadLetter.of(
        envelope.raw, "echo", stage="inference", topic="t", partition=0, offset=envelope.position.offset
    )


class GatedSlot:
    """Answers the requests that `let_go` names: with the response in `responses`, else with a dead letter."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.responses: dict[int, Response] = {}
        self.answers_at_once = False
        self._changed = threading.Condition()
        self._running: dict[int, Envelope] = {}
        self._let_go: set[int] = set()
        self._fault: Exception | None = None
        self._retries: list[Answer | Retry] = []
        self._receiver: threading.Thread | None = None
        """The thread that waits in `receive`, or has got the fault there."""

    @property
    def is_alive(self) -> bool:
        return self._fault is None

    @property
    def running(self) -> list[int]:
        """Offsets of the requests that it has not answered."""
        return sorted(self._running)

    @property
    def unanswered(self) -> list[Envelope]:
        return [self._running[offset] for offset in self.running]

    def send(self, order: Envelope) -> None:
        with self._changed:
            self.sent.append(order.position.offset)
            self._running[order.position.offset] = order
            self._changed.notify_all()

    def receive(self) -> list[Answer | Retry]:
        with self._changed:
            self._receiver = threading.current_thread()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._fault or self._to_tell())
            if self._fault is not None:
                raise self._fault
            self._receiver = None
            done = self._done()
            self._let_go -= done
            retries, self._retries = self._retries, []
            return retries + [self._answer(self._running.pop(offset)) for offset in sorted(done)]

    def ask_again(self, *offsets: int) -> None:
        """Retry these requests, as after a death of the process while they ran."""
        with self._changed:
            for offset in offsets:
                tried = self._running[offset]
                self._running[offset] = replace(tried, attempts=tried.attempts + 1)
                self._retries.append(Retry(self._running[offset]))
            self._changed.notify_all()

    def let_go(self, *offsets: int) -> None:
        with self._changed:
            self._let_go.update(offsets)
            self._changed.notify_all()

    def answer_at_once(self, whether: bool) -> None:
        with self._changed:
            self.answers_at_once = whether
            self._changed.notify_all()

    def fail(self, fault: Exception) -> None:
        with self._changed:
            self._fault = fault
            self._changed.notify_all()

    def end(self) -> None:
        self.fail(EOFError("the slot was ended"))

    def settle(self) -> None:
        """Return once the receiver has taken all results, or has ended with the fault."""
        with self._changed:
            settled = self._changed.wait_for(lambda: self._receiver and (self._fault or not self._to_tell()), WAIT_S)
        assert settled, "nobody receives"
        if self._fault is not None:
            self._receiver.join(WAIT_S)

    def _to_tell(self) -> bool:
        return bool(self._retries or self._done())

    def _done(self) -> set[int]:
        return set(self._running) if self.answers_at_once else self._let_go & set(self._running)

    def _answer(self, envelope: Envelope) -> Answer:
        response = self.responses.get(envelope.position.offset)
        return Answer(envelope.position, letter(envelope) if response is None else WrittenResponse.of(response))


class StandInSlot(GatedSlot):
    """A slot as the Flink functions use it. When `let_go` returns, the answers have reached the function's side."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.ready = Ready(
            slot=index, device="cpu", engine="e", model="m", dtype="float32", threads=1, chunk_bytes=1, load_s=0.0
        )
        self.most_running = 0
        self.groups: list[list[int]] = []
        self.taken: list[Envelope] = []
        """All requests that it has received, alone or in micro-batches."""
        self.newest_first = False
        self.ended = False
        self.closed = False

    def send(self, order: Envelope) -> None:
        self._require_alive()
        self.taken.append(order)
        super().send(order)
        self.most_running = max(self.most_running, len(self._running))

    def answer(self, batch: Sequence[Envelope]) -> list[Answer]:
        self._require_alive()
        self.taken += batch
        self.groups.append([one.position.offset for one in batch])
        answers = [self._answer(one) for one in batch]
        return answers[::-1] if self.newest_first else answers

    def let_go(self, *offsets: int) -> None:
        super().let_go(*offsets)
        self.settle()

    def end(self) -> None:
        self.ended = True
        super().end()

    def close(self) -> None:
        assert self.ended or self._receiver is None, "somebody may still receive"
        self.closed = True

    def _require_alive(self) -> None:
        if self._fault is not None:
            raise RuntimeError(f"the slot's process has ended: {self._fault}")


class StandInSlots:
    """Makes the slots of functions, and keeps them. They share `responses`, and the order within a micro-batch."""

    def __init__(self, responses: Mapping[int, Response] | None = None, newest_first: bool = False) -> None:
        self.made: list[StandInSlot] = []
        self.responses = dict(responses or {})
        self.newest_first = newest_first
        self.answers_at_once = False

    def make(self, config: JobConfig, index: int, clock: Clock, metrics: SlotMetrics) -> StandInSlot:
        made = StandInSlot(index)
        made.responses = self.responses
        made.newest_first = self.newest_first
        made.answers_at_once = self.answers_at_once
        self.made.append(made)
        return made

    def answer_at_once(self, whether: bool) -> None:
        """Answer every request at once, or only those that are let go."""
        self.answers_at_once = whether
        for slot in self.made:
            slot.answer_at_once(whether)

    @property
    def alive(self) -> list[StandInSlot]:
        return [slot for slot in self.made if slot.is_alive]

    @property
    def last(self) -> StandInSlot:
        return self.made[-1]


@contextmanager
def no_waits() -> Iterator[list[float]]:
    """Replaces waits by immediate results. Yields the time-outs of all waits for answers.

    A wait for answers finds all that the slot has let go. A wait for capacity makes the slot answer its oldest request.
    """
    waits: list[float] = []
    take, wait_for_capacity = Pump.take, Pump.wait_for_capacity

    def take_at_once(pump: Pump, owner: int, timeout_s: float = 0.0) -> list[Answer]:
        waits.append(timeout_s)
        pump._slot.settle()  # type: ignore[attr-defined]
        return take(pump, owner)

    def make_capacity(pump: Pump, timeout_s: float) -> bool:
        if not wait_for_capacity(pump, 0.0):
            pump._slot.let_go(pump._slot.running[0])  # type: ignore[attr-defined]
        return wait_for_capacity(pump, 0.0)

    with mock.patch.object(Pump, "take", take_at_once), mock.patch.object(Pump, "wait_for_capacity", make_capacity):
        yield waits

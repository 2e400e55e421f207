"""Between two steps of its engine, a slot's process takes in new requests. Answers leave at once."""

import threading
from collections.abc import Iterator, Sequence
from multiprocessing import Pipe
from queue import Queue
from typing import Any

import pytest

from core.clock import ManualClock, SystemClock
from inference_service.stats import EngineStats
from operators.envelope import Answer, Envelope, MicroBatch, RecordPosition, SlotStats
from operators.slots.channel import Channel, ChannelClosedError
from operators.slots.process import Heartbeat
from operators.slots.server import HEARTBEAT_S, HeartbeatSender, serve
from tests.operators.test_pump import WAIT_S, envelope, letter

STATS = SlotStats(EngineStats(passes=7), None, resident_bytes=1 << 20)


class SteppedSlot:
    """Each step publishes the running requests, and waits for its result from the test: answers, or an error."""

    stats = STATS

    def __init__(self) -> None:
        self.running: dict[int, Envelope] = {}
        self.began: Queue[list[int]] = Queue()
        self.outcomes: Queue[list[int] | Exception] = Queue()

    @property
    def unfinished(self) -> int:
        return len(self.running)

    def submit(self, envelope: Envelope) -> Answer | None:
        if envelope.raw == b"refused":
            return answer(envelope)
        self.running[envelope.position.offset] = envelope
        return None

    def step(self) -> list[Answer]:
        self.began.put(list(self.running))
        outcome = self.outcomes.get(timeout=WAIT_S)
        if isinstance(outcome, Exception):
            raise outcome
        return [answer(self.running.pop(offset)) for offset in outcome]

    def answer(self, batch: Sequence[Envelope]) -> list[Answer]:
        return [answer(one) for one in reversed(batch)]


class Server:
    """Serves a slot at the other end of `connection`. `error` is the exception that ended it."""

    def __init__(self, slot: SteppedSlot) -> None:
        self.connection, theirs = Pipe()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(Channel(theirs), slot), daemon=True)
        self._thread.start()

    def receive(self) -> Any:
        """The next message that is not a heartbeat."""
        while True:
            assert self.connection.poll(WAIT_S)
            said = self.connection.recv()
            if said != Heartbeat(STATS):
                return said

    def join(self) -> None:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def _run(self, channel: Channel, slot: SteppedSlot) -> None:
        try:
            serve(channel, slot, HeartbeatSender(channel, SystemClock()))  # type: ignore[arg-type]
        except BaseException as error:
            self.error = error


def answer(envelope: Envelope) -> Answer:
    return Answer(envelope.position, letter(envelope))


def refused(number: int) -> Envelope:
    return Envelope(0, b"refused", RecordPosition("t", 0, number), 0.0)


@pytest.fixture
def slot() -> SteppedSlot:
    return SteppedSlot()


@pytest.fixture
def server(slot: SteppedSlot) -> Iterator[Server]:
    made = Server(slot)
    yield made
    made.connection.close()
    slot.outcomes.put([])
    made.join()
    assert made.error is not None


def test_a_request_joins_between_two_steps_and_leaves_with_the_step_it_finishes_in(
    server: Server, slot: SteppedSlot
) -> None:
    server.connection.send([envelope(1)])
    assert slot.began.get(timeout=WAIT_S) == [1]
    server.connection.send([envelope(2)])
    server.connection.send([envelope(3)])
    slot.outcomes.put([])
    assert slot.began.get(timeout=WAIT_S) == [1, 2, 3]
    slot.outcomes.put([2, 3])
    assert server.receive() == [answer(envelope(2)), answer(envelope(3))]
    assert slot.began.get(timeout=WAIT_S) == [1]
    slot.outcomes.put([1])
    assert server.receive() == [answer(envelope(1))]


def test_what_the_model_cannot_answer_leaves_though_nothing_runs(server: Server, slot: SteppedSlot) -> None:
    for number in (5, 6):
        server.connection.send([refused(number)])
        assert server.receive() == [answer(refused(number))]


def test_what_the_model_cannot_answer_leaves_before_what_runs(server: Server, slot: SteppedSlot) -> None:
    server.connection.send([envelope(1)])
    assert slot.began.get(timeout=WAIT_S) == [1]
    server.connection.send([refused(2)])
    slot.outcomes.put([])
    assert server.receive() == [answer(refused(2))]
    assert slot.running.keys() == {1}


def test_orders_that_come_together_are_taken_in_together(server: Server, slot: SteppedSlot) -> None:
    server.connection.send([envelope(1), refused(2), envelope(3), MicroBatch([envelope(4), envelope(5)])])
    assert server.receive() == [answer(refused(2))]
    assert server.receive() == [answer(envelope(5)), answer(envelope(4))]
    assert slot.began.get(timeout=WAIT_S) == [1, 3]


def test_a_group_is_answered_as_a_whole(server: Server) -> None:
    server.connection.send([MicroBatch([envelope(1), envelope(2)])])
    assert server.receive() == [answer(envelope(2)), answer(envelope(1))]


@pytest.mark.parametrize("outcome", [[], [1]], ids=["goes on", "has something to say"])
def test_a_server_that_runs_ends_with_the_other_side(server: Server, slot: SteppedSlot, outcome: list[int]) -> None:
    server.connection.send([envelope(1)])
    assert slot.began.get(timeout=WAIT_S) == [1]
    server.connection.close()
    slot.outcomes.put(outcome)
    server.join()
    assert isinstance(server.error, ChannelClosedError)
    assert slot.began.empty()


def test_a_server_that_waits_ends_with_the_other_side(server: Server, slot: SteppedSlot) -> None:
    server.connection.close()
    server.join()
    assert isinstance(server.error, ChannelClosedError)
    assert slot.began.empty()


def test_an_engine_that_raises_ends_the_server(server: Server, slot: SteppedSlot) -> None:
    fault = OSError("device lost")
    server.connection.send([envelope(1)])
    slot.outcomes.put(fault)
    server.join()
    assert server.error is fault


def test_a_server_that_waits_says_that_it_lives(server: Server, slot: SteppedSlot) -> None:
    for _ in range(2):
        assert server.connection.poll(WAIT_S)
        assert server.connection.recv() == Heartbeat(STATS)


def test_a_pulse_beats_no_faster_than_it_may(slot: SteppedSlot) -> None:
    ours, theirs = Pipe()
    clock = ManualClock()
    heartbeat = HeartbeatSender(Channel(theirs), clock)
    heard = []
    for advance_ms in (0.0, HEARTBEAT_S * 1e3 - 1.0, 0.5, 0.5, 10 * HEARTBEAT_S * 1e3, 1.0):
        clock.advance(advance_ms)
        heartbeat.beat(slot)  # type: ignore[arg-type]
        heard.append(ours.poll() and ours.recv() == Heartbeat(STATS))
    assert heard == [True, False, False, True, True, False]

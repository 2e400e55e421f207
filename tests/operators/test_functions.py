"""The micro-batch function without a cluster: its state, its timers, and what it lets out."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from core.clock import ManualClock
from core.config import BatchingConfig, JobConfig
from core.records import DeadLetter, Response
from operators.envelope import Answer, Envelope, Ready, Source, WarmUp
from operators.functions import DEAD_LETTERS, END_OF_INPUT, READY, MicroBatchFunction
from tests.experiments.experiment_samples import response
from tests.operators.memory_journal import MemoryJournal
from tests.operators.timer_context import TimerContext


class EchoSlot:
    """Answers each envelope with a letter that carries its bytes, and a good one with a response."""

    def __init__(self, *_: object) -> None:
        self.ready = Ready(slot=0, device="cpu", engine="e", model="m", threads=1, chunk_bytes=1, load_s=0.0)

    def answer(self, batch: Sequence[Envelope]) -> list[Answer]:
        return [Answer(one.source, echo(one)) for one in batch]

    def close(self) -> None:
        pass


def echo(envelope: Envelope) -> DeadLetter | Response:
    if envelope.raw == b"good":
        return response(request_id="good")
    return DeadLetter.of(envelope.raw, "echo", stage="inference", topic="t", partition=0, offset=envelope.source.offset)


class State:
    """A list state that outlives the function, as a checkpoint does."""

    def __init__(self) -> None:
        self.items: list[Envelope] = []

    def get(self) -> list[Envelope]:
        return list(self.items)

    def add(self, item: Envelope) -> None:
        self.items.append(item)

    def clear(self) -> None:
        self.items.clear()


class Context(TimerContext):
    """With a list state."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self._state = state

    def get_list_state(self, _: object) -> State:
        return self._state


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1000.0)


def opened(context: Context, clock: ManualClock) -> MicroBatchFunction:
    config = JobConfig(parallelism=1, batching=BatchingConfig(batch_size=3, max_wait_ms=100))
    function = MicroBatchFunction(config, EchoSlot, lambda: clock, lambda _: MemoryJournal())
    function.open(context)
    return function


def envelope(number: int) -> Envelope:
    return Envelope(0, b"r%d" % number, Source("t", 0, number), 0.0)


def offsets(rows: Iterable[Any]) -> list[int]:
    """Of the letters among `rows`; with whatever comes first there is the ready record."""
    letters = [row for tag, row in rows if tag is DEAD_LETTERS]
    return [json.loads(row[1])["offset"] for row in letters]


def test_a_full_batch_leaves_at_once_and_takes_its_state_along(clock: ManualClock) -> None:
    state = State()
    context = Context(state)
    function = opened(context, clock)
    out = [offsets(function.process_element(envelope(number), context)) for number in range(4)]
    assert out == [[], [], [0, 1, 2], []]
    assert [one.source.offset for one in state.items] == [3]


def test_a_timer_closes_the_batch_that_it_was_set_for_and_no_other(clock: ManualClock) -> None:
    context = Context(State())
    function = opened(context, clock)
    list(function.process_element(envelope(0), context))
    assert context.processing == [3000, 1101]
    clock.advance(90)
    for number in (1, 2, 3):
        list(function.process_element(envelope(number), context))
    assert context.processing == [3000, 1101, 1191]
    clock.advance(11)
    assert offsets(function.on_timer(1101, context)) == []
    clock.advance(90)
    assert offsets(function.on_timer(1191, context)) == [3]


def test_a_clock_that_is_set_back_strands_nothing(clock: ManualClock) -> None:
    context = Context(State())
    function = opened(context, clock)
    list(function.process_element(envelope(0), context))
    clock.advance(-500)
    assert offsets(function.on_timer(context.processing[1], context)) == [0]


def test_the_end_of_input_flushes_what_has_not_waited_long_enough(clock: ManualClock) -> None:
    context = Context(State())
    function = opened(context, clock)
    list(function.process_element(envelope(0), context))
    assert context.event == [END_OF_INPUT]
    assert offsets(function.on_timer(END_OF_INPUT, context)) == [0]


@pytest.mark.parametrize("waiting", [1, 2])
def test_what_waited_before_a_restart_comes_first_and_once(clock: ManualClock, waiting: int) -> None:
    state = State()
    context = Context(state)
    function = opened(context, clock)
    for number in range(waiting):
        list(function.process_element(envelope(number), context))
    restarted = opened(context, clock)
    out = [offset for number in (8, 9) for offset in offsets(restarted.process_element(envelope(number), context))]
    out += offsets(restarted.on_timer(END_OF_INPUT, context))
    assert out == [*range(waiting), 8, 9]
    assert state.items == []


def test_a_timer_alone_restores_what_waited(clock: ManualClock) -> None:
    state = State()
    context = Context(state)
    list(opened(context, clock).process_element(envelope(0), context))
    assert offsets(opened(context, clock).on_timer(END_OF_INPUT, context)) == [0]


def test_responses_leave_as_the_slot_stamped_them_and_not_to_the_side(clock: ManualClock) -> None:
    context = Context(State())
    function = opened(context, clock)
    list(function.process_element(Envelope(0, b"good", Source("t", 0, 1), 0.0), context))
    (row,) = function.on_timer(END_OF_INPUT, context)
    assert tuple(row) == ("good", response(request_id="good").to_json())


def test_a_call_to_warm_up_is_answered_by_the_ready_record(clock: ManualClock) -> None:
    context = Context(State())
    ((tag, row),) = opened(context, clock).process_element(WarmUp(0), context)
    assert tag is READY
    assert json.loads(row[1])["model"] == "m"

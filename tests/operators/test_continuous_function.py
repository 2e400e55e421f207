"""The continuous function without a cluster: its state, who is answered when, and what a restart asks again."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from core.clock import ManualClock
from core.config import BatchingConfig, EngineConfig, JobConfig
from core.records import Response
from operators.envelope import Answer, Envelope, Ready, WarmUp
from operators.functions import DEAD_LETTERS, END_OF_INPUT, FULL_POLL_S, POLL_S, READY, ContinuousFunction
from operators.pump import Pump
from tests.experiments.experiment_samples import response
from tests.operators.memory_journal import MemoryJournal
from tests.operators.test_pump import WAIT_S, GatedSlot, envelope
from tests.operators.timer_context import KEY, TimerContext


class Slot(GatedSlot):
    """Is found by the test, and tells whether it was closed."""

    made: "list[Slot]" = []  # noqa: RUF012 - the function makes its slot itself; the test finds it here

    def __init__(self, *_: object) -> None:
        super().__init__()
        self.ended = False
        self.closed = False
        self.ready = Ready(slot=0, device="cpu", engine="e", model="m", threads=1, chunk_bytes=1, load_s=0.0)
        Slot.made.append(self)

    def end(self) -> None:
        self.ended = True
        super().end()

    def close(self) -> None:
        assert self.ended, "somebody may still receive"
        self.closed = True


class State:
    """The map states of all keys; outlives the function, as a checkpoint does."""

    def __init__(self) -> None:
        self.of_key: dict[int, dict[str, Envelope]] = {}


class Context(TimerContext):
    """With the map state of the current key."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self._state = state

    def get_map_state(self, _: object) -> "Context":
        return self

    def _current(self) -> dict[str, Envelope]:
        return self._state.of_key.setdefault(self.key, {})

    def put(self, ticket: str, value: Envelope) -> None:
        self._current()[ticket] = value

    def remove(self, ticket: str) -> None:
        del self._current()[ticket]

    def items(self) -> Iterable[tuple[str, Envelope]]:
        return self._current().items()


@pytest.fixture
def open_function() -> Iterator[Callable[[Context], ContinuousFunction]]:
    opened: list[ContinuousFunction] = []

    def make(context: Context) -> ContinuousFunction:
        config = JobConfig(parallelism=1, engine=EngineConfig(max_running=2), batching=BatchingConfig(max_in_flight=3))
        function = ContinuousFunction(config, Slot, lambda: ManualClock(1000.0), lambda _: MemoryJournal())
        function.open(context)
        opened.append(function)
        return function

    yield make
    for function in opened:
        function.close()
    assert all(slot.closed for slot in Slot.made)
    Slot.made.clear()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For how long each look for answers would wait; none does."""
    found: list[float] = []

    def take(pump: Pump, owner: int, timeout_s: float = 0.0) -> list[Answer]:
        found.append(timeout_s)
        return plain(pump, owner)

    plain = Pump.take
    monkeypatch.setattr(Pump, "take", take)
    return found


Open = Callable[[Context], ContinuousFunction]


def offsets(rows: Iterable[Any]) -> list[int]:
    """Of the letters among `rows`; with whatever comes first there is the ready record."""
    letters = [row for tag, row in rows if tag is DEAD_LETTERS]
    return [json.loads(row[1])["offset"] for row in letters]


def process(function: ContinuousFunction, context: Context, *numbers: int) -> list[int]:
    return [offset for number in numbers for offset in offsets(function.process_element(envelope(number), context))]


def fire(function: ContinuousFunction, context: Context, until: int) -> list[int]:
    """Fire the timers that are set, as often as it takes to get `until` answers."""
    found: list[int] = []
    for _ in range(2000):
        timers, context.processing = context.processing, []
        for at_ms in timers:
            found += offsets(function.on_timer(at_ms, context))
        if len(found) >= until:
            return found
    raise AssertionError(f"only {found} came")


def test_what_is_in_flight_is_in_state_until_it_is_answered(open_function: Open) -> None:
    state = State()
    context = Context(state)
    function = open_function(context)
    assert process(function, context, 1, 2) == []
    assert sorted(state.of_key[KEY]) == ["0-1", "0-2"]
    Slot.made[0].let_go(2)
    assert fire(function, context, 1) == [2]
    assert sorted(state.of_key[KEY]) == ["0-1"]


def test_timers_are_set_as_long_as_something_is_in_flight_and_not_after(open_function: Open) -> None:
    context = Context(State())
    function = open_function(context)
    process(function, context, 1, 2)
    # The next one, and a spare that is still in state while that one fires.
    assert context.processing == [3000, 1001]
    assert context.event == [END_OF_INPUT]
    context.processing = []
    list(function.on_timer(1001, context))
    assert context.processing == [1001]
    Slot.made[0].let_go(1, 2)
    fire(function, context, 2)
    assert 1001 not in context.processing


def test_a_timer_waits_only_where_something_of_its_key_is_outstanding(open_function: Open, waits: list[float]) -> None:
    context = Context(State())
    function = open_function(context)
    process(function, context, 1)
    waits.clear()
    context.key = KEY + 1
    context.processing = []
    assert list(function.on_timer(1001, context)) == []
    assert list(function.on_timer(3000, context)) == []
    assert list(function.on_timer(END_OF_INPUT, context)) == []
    assert waits == []
    assert context.processing == [3000]
    context.key = KEY
    assert list(function.on_timer(1001, context)) == []
    assert waits == [POLL_S]


def test_a_timer_waits_for_longer_where_every_row_of_the_engine_is_taken(
    open_function: Open, waits: list[float]
) -> None:
    context = Context(State())
    function = open_function(context)
    process(function, context, 1, 2)
    waits.clear()
    assert list(function.on_timer(1001, context)) == []
    assert waits == [FULL_POLL_S]


def test_at_the_cap_the_stream_waits_and_lets_out_what_is_done(open_function: Open) -> None:
    context = Context(State())
    function = open_function(context)
    process(function, context, 1, 2, 3)
    Slot.made[0].let_go(1)
    out = process(function, context, 4)
    out += fire(function, context, 1 - len(out)) if not out else []
    assert out == [1]
    assert Slot.made[0].sent[:3] == [1, 2, 3]


def test_the_end_of_input_answers_all_that_is_in_flight(open_function: Open) -> None:
    state = State()
    context = Context(state)
    function = open_function(context)
    process(function, context, 1, 2, 3)
    Slot.made[0].let_go(1, 2, 3)
    assert sorted(offsets(function.on_timer(END_OF_INPUT, context))) == [1, 2, 3]
    assert state.of_key[KEY] == {}


def test_after_a_restart_what_was_in_flight_is_asked_again_before_anything_newer(open_function: Open) -> None:
    state = State()
    context = Context(state)
    process(open_function(context), context, 3, 1, 2)
    restarted = open_function(context)
    # Three are in flight at once: the cap holds the newer one back until one of them is done.
    Slot.made[1].let_go(1, 2, 3, 9)
    out = process(restarted, context, 9)
    out += fire(restarted, context, 4 - len(out))
    assert Slot.made[1].sent == [1, 2, 3, 9]
    assert sorted(out) == [1, 2, 3, 9]
    assert state.of_key[KEY] == {}


def test_attempts_survive_a_restart_of_the_job_and_the_time_it_was_down_does_not_count(open_function: Open) -> None:
    state = State()
    context = Context(state)
    function = open_function(context)
    process(function, context, 1, 2)
    Slot.made[0].ask_again(2)
    deadline_s = time.monotonic() + WAIT_S
    while state.of_key[KEY]["0-2"].attempts == 0:
        assert time.monotonic() < deadline_s
        list(function.on_timer(context.processing[-1], context))
    assert state.of_key[KEY]["0-1"].attempts == 0
    process(open_function(context), context, 3)
    again = Slot.made[1]._running
    assert {offset: (one.attempts, one.decoded_at_ms) for offset, one in again.items()} == {
        1: (0, 1000.0),
        2: (1, 1000.0),
        3: (0, 0.0),
    }


def test_a_timer_alone_restores_what_was_in_flight(open_function: Open) -> None:
    context = Context(State())
    process(open_function(context), context, 1)
    restarted = open_function(context)
    Slot.made[1].let_go(1)
    assert offsets(restarted.on_timer(END_OF_INPUT, context)) == [1]


def test_keys_that_met_at_one_subtask_keep_their_state_apart(open_function: Open) -> None:
    """As after a restart at a lower parallelism: an answer leaves under the key whose state holds its request."""
    state = State()
    context = Context(state)
    function = open_function(context)
    process(function, context, 1)
    context.key = KEY + 1
    process(function, context, 2)
    Slot.made[0].let_go(1, 2)
    assert offsets(function.on_timer(END_OF_INPUT, context)) == [2]
    assert sorted(state.of_key[KEY]) == ["0-1"]
    context.key = KEY
    assert offsets(function.on_timer(END_OF_INPUT, context)) == [1]
    assert state.of_key == {KEY: {}, KEY + 1: {}}


def test_a_response_leaves_under_its_id_with_the_time_of_leaving(open_function: Open) -> None:
    context = Context(State())
    function = open_function(context)
    finished = response(request_id="good", created_at_ms=400.0)
    Slot.made[0].responses[1] = finished
    list(function.process_element(envelope(1), context))
    Slot.made[0].let_go(1)
    (row,) = function.on_timer(END_OF_INPUT, context)
    assert row[0] == "good"
    stamped = finished.model_copy(update={"completed_at_ms": 1000.0, "e2e_ms": 600.0})
    assert Response.model_validate_json(row[1]) == stamped


def test_a_slot_that_fails_fails_the_job(open_function: Open) -> None:
    context = Context(State())
    function = open_function(context)
    process(function, context, 1)
    Slot.made[0].fail(OSError("device lost"))
    with pytest.raises(RuntimeError, match="device lost"):
        list(function.on_timer(END_OF_INPUT, context))


def test_a_call_to_warm_up_is_answered_by_the_ready_record(open_function: Open) -> None:
    context = Context(State())
    function = open_function(context)
    ((tag, row),) = function.process_element(WarmUp(0), context)
    assert tag is READY
    assert json.loads(row[1])["model"] == "m"

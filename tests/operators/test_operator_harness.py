"""The harness treats state, timers, outputs and checkpoints as Flink 2.3 and PyFlink do."""

from collections.abc import Iterator
from typing import Any

import pytest
from pyflink.common import Row, Types
from pyflink.datastream import KeyedProcessFunction, OutputTag, ProcessFunction, RuntimeContext, TimeDomain
from pyflink.datastream.state import ListStateDescriptor, MapStateDescriptor, ValueStateDescriptor

from core.clock import ManualClock
from tests.operators.flink.key_groups import MAX_PARALLELISM, key_group, subtask_of
from tests.operators.flink.snapshot import Snapshot
from tests.operators.flink.timers import Timer
from tests.operators.operator_harness import END_OF_TIME, OperatorHarness, Output

KEY, OTHER = 7, 8
ASIDE = OutputTag("aside", Types.STRING())
PROCESSING, EVENT = TimeDomain.PROCESSING_TIME, TimeDomain.EVENT_TIME


class Obedient(KeyedProcessFunction):
    """Calls the methods that its elements name, with their arguments. Emits a line when a timer fires."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def open(self, runtime_context: RuntimeContext) -> None:
        self.calls.append("open")
        self.context = runtime_context
        self.value = runtime_context.get_state(ValueStateDescriptor("value", Types.PICKLED_BYTE_ARRAY()))
        self.list = runtime_context.get_list_state(ListStateDescriptor("list", Types.PICKLED_BYTE_ARRAY()))
        self.map = runtime_context.get_map_state(MapStateDescriptor("map", Types.STRING(), Types.PICKLED_BYTE_ARRAY()))
        self.counter = runtime_context.get_metrics_group().add_group("mine").counter("calls")
        self.counter.inc(100)
        runtime_context.get_metrics_group().gauge("calls", lambda: len(self.calls))

    def close(self) -> None:
        self.calls.append("close")

    def process_element(self, value: tuple[Any, ...], ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        self.counter.inc()
        name, *arguments = value
        self.calls.append(name)
        yield from getattr(self, name)(ctx, *arguments) or ()

    def on_timer(self, timestamp: int, ctx: KeyedProcessFunction.OnTimerContext) -> Iterator[Any]:
        now, watermark = ctx.timer_service().current_processing_time(), ctx.timer_service().current_watermark()
        yield "rang", ctx.get_current_key(), timestamp, now if ctx.time_domain() is PROCESSING else watermark
        if self.value.value() == "again":
            self.value.clear()
            self.set(ctx, timestamp, ctx.time_domain())
            ctx.timer_service().delete_processing_time_timer(timestamp + 1)
            ctx.timer_service().delete_event_time_timer(timestamp + 1)

    def say(self, ctx: KeyedProcessFunction.Context, *words: Any) -> Any:
        return words

    def say_aside(self, ctx: KeyedProcessFunction.Context, *words: Any) -> Any:
        return [(ASIDE, word) for word in words]

    def set(self, ctx: KeyedProcessFunction.Context, at: int, domain: TimeDomain = PROCESSING) -> None:
        service = ctx.timer_service()
        (service.register_processing_time_timer if domain is PROCESSING else service.register_event_time_timer)(at)

    def delete(self, ctx: KeyedProcessFunction.Context, at: int) -> None:
        ctx.timer_service().delete_processing_time_timer(at)

    def write(self, ctx: KeyedProcessFunction.Context, what: Any) -> None:
        self.value.update(what)
        self.list.add(what)
        self.map.put("place", what)

    def write_and_change(self, ctx: KeyedProcessFunction.Context, what: list[Any]) -> None:
        self.write(ctx, what)
        what.append("changed later")
        self.value.value().append("changed after it was read")
        next(iter(self.list.get())).append("changed after it was read")
        self.map.get("place").append("changed after it was read")

    def read(self, ctx: KeyedProcessFunction.Context) -> Any:
        return self.value.value(), list(self.list.get()), dict(self.map.items())

    def forget(self, ctx: KeyedProcessFunction.Context) -> None:
        self.value.clear()
        self.list.clear()
        self.map.remove("place")

    def call(self, ctx: KeyedProcessFunction.Context, state: str, method: str, *arguments: Any) -> Any:
        return [getattr(getattr(self, state), method)(*arguments)]

    def empty_while_iterating(self, ctx: KeyedProcessFunction.Context) -> None:
        for place in self.map.keys():  # noqa: SIM118 - it is no dictionary
            self.map.remove(place)

    def say_and_fail(self, ctx: KeyedProcessFunction.Context) -> Iterator[str]:
        yield "said"
        raise OSError("device lost")


@pytest.fixture
def harness() -> OperatorHarness:
    return OperatorHarness(Obedient, ManualClock(1000.0))


def values(outputs: list[Output]) -> list[Any]:
    return [output.value for output in outputs]


def function_of(harness: OperatorHarness) -> Obedient:
    return harness._function


# Opening and closing.


def test_a_function_opens_with_its_first_element() -> None:
    made: list[Obedient] = []

    def make() -> Obedient:
        made.append(Obedient())
        return made[-1]

    harness = OperatorHarness(make)
    harness.advance(1000)
    harness.close()
    assert made == []
    harness.process(("say",), KEY)
    harness.process(("say",), KEY)
    harness.close()
    (function,) = made
    assert function.calls == ["open", "say", "say", "close"]


def test_a_function_opens_with_a_restored_timer(harness: OperatorHarness) -> None:
    harness.restore(Snapshot({}, (Timer(1500, KEY, PROCESSING),)))
    assert values(harness.advance(500)) == [("rang", KEY, 1500, 1500)]
    assert function_of(harness).calls == ["open"]


def test_a_function_that_cannot_be_opened_is_closed() -> None:
    closed: list[bool] = []

    class Unopenable(Obedient):
        def open(self, runtime_context: RuntimeContext) -> None:
            raise OSError("no device")

        def close(self) -> None:
            closed.append(True)

    harness = OperatorHarness(Unopenable)
    with pytest.raises(OSError, match="no device"):
        harness.process(("say",), KEY)
    harness.close()
    assert closed == [True]


def test_a_function_knows_its_place() -> None:
    harness = OperatorHarness(Obedient, parallelism=4, subtask=3)
    (key,) = [key for key in range(4) if subtask_of(key, 4) == 3][:1]
    harness.process(("say",), key)
    context = function_of(harness).context
    assert (context.get_index_of_this_subtask(), context.get_number_of_parallel_subtasks()) == (3, 4)
    assert context.get_max_number_of_parallel_subtasks() == MAX_PARALLELISM


# Outputs.


def test_outputs_are_collected_in_order_with_key_and_tag(harness: OperatorHarness) -> None:
    assert harness.process(("say", "a", "b"), KEY) == [Output(KEY, None, "a"), Output(KEY, None, "b")]
    harness.process(("say_aside", "c"), OTHER)
    harness.process(("say", "d"), KEY)
    assert [(output.key, output.tag, output.value) for output in harness.outputs] == [
        (KEY, None, "a"),
        (KEY, None, "b"),
        (OTHER, "aside", "c"),
        (KEY, None, "d"),
    ]


def test_what_left_before_a_failure_has_left_and_nothing_goes_on_after_it(harness: OperatorHarness) -> None:
    with pytest.raises(OSError, match="device lost"):
        harness.process(("say_and_fail",), KEY)
    assert values(harness.outputs) == ["said"]
    with pytest.raises(AssertionError, match="failed"):
        harness.process(("say",), KEY)
    with pytest.raises(AssertionError, match="no checkpoint"):
        harness.snapshot()
    harness.crash()
    assert values(harness.process(("say", "on"), KEY)) == ["on"]


def test_what_the_type_of_a_stream_cannot_hold_does_not_leave(harness: OperatorHarness) -> None:
    with pytest.raises(AttributeError):
        harness.process(("say_aside", 1), KEY)
    harness = OperatorHarness(Obedient, output_type=Types.ROW_NAMED(["key", "value"], [Types.STRING()] * 2))
    (output,) = harness.process(("say", Row("k", "v")), KEY)
    assert output.value.as_dict() == {"key": "k", "value": "v"}
    with pytest.raises(AttributeError):
        harness.process(("say", "no row"), KEY)


# State.


def test_state_belongs_to_a_key(harness: OperatorHarness) -> None:
    harness.process(("write", "x"), KEY)
    assert values(harness.process(("read",), OTHER)) == [None, [], {}]
    assert values(harness.process(("read",), KEY)) == ["x", ["x"], {"place": "x"}]
    assert (harness.state("value", KEY), harness.state("list", KEY)) == ("x", ["x"])
    assert (harness.state("map", KEY), harness.state("map", OTHER)) == ({"place": "x"}, {})
    assert not harness.holds_nothing
    harness.process(("forget",), OTHER)
    assert not harness.holds_nothing
    harness.process(("forget",), KEY)
    assert harness.holds_nothing


def test_an_object_is_not_shared_with_state(harness: OperatorHarness) -> None:
    element = ["x"]
    harness.process(("write_and_change", element), KEY)
    assert element == ["x"]
    assert values(harness.process(("read",), KEY)) == [["x"], [["x"]], {"place": ["x"]}]


def test_a_list_state_adds_replaces_and_has_no_length(harness: OperatorHarness) -> None:
    harness.process(("call", "list", "add_all", [1, 2]), KEY)
    harness.process(("call", "list", "add", 3), KEY)
    assert harness.state("list", KEY) == [1, 2, 3]
    harness.process(("call", "list", "update", [4]), KEY)
    assert harness.state("list", KEY) == [4]
    with pytest.raises(TypeError):
        len(function_of(harness).list.get())  # type: ignore[arg-type]


def test_a_map_state_is_a_map(harness: OperatorHarness) -> None:
    harness.process(("call", "map", "put_all", [("a", 1), ("b", None)]), KEY)
    harness.process(("call", "map", "remove", "never there"), KEY)
    said = [values(harness.process(("call", "map", "contains", place), KEY)) for place in "abc"]
    assert said == [[True], [False], [False]]
    assert values(harness.process(("call", "map", "get", "c"), KEY)) == [None]
    assert harness.state("map", KEY) == {"a": 1, "b": None}
    assert values(harness.process(("call", "map", "is_empty"), KEY)) == [False]
    assert values(harness.process(("call", "map", "is_empty"), OTHER)) == [True]


def test_a_map_state_refuses_keys_of_another_type(harness: OperatorHarness) -> None:
    with pytest.raises(AttributeError):
        harness.process(("call", "map", "put", 1, "x"), KEY)


def test_who_modifies_a_state_while_iterating_over_it_is_told(harness: OperatorHarness) -> None:
    harness.process(("write", "x"), KEY)
    with pytest.raises(RuntimeError, match="'map' was modified"):
        harness.process(("empty_while_iterating",), KEY)


def test_a_function_without_keys_has_no_state_and_no_timers() -> None:
    class Keyless(ProcessFunction):
        def open(self, runtime_context: RuntimeContext) -> None:
            self.context = runtime_context

        def process_element(self, value: str, ctx: ProcessFunction.Context) -> Iterator[Any]:
            yield value, ctx.timestamp()
            if value == "state":
                self.context.get_state(ValueStateDescriptor("value", Types.LONG()))
            if value == "timer":
                ctx.timer_service().register_event_time_timer(1)

    harness = OperatorHarness(Keyless, parallelism=2, subtask=1)
    assert harness.process("x", timestamp=5) == [Output(None, None, ("x", 5))]
    for wish in ("state", "timer"):
        with pytest.raises(Exception, match=r"(?i)keyed ?stream"):
            harness.process(wish)
        harness.crash()


# Timers.


def test_a_timer_rings_once_at_its_time_for_its_key(harness: OperatorHarness) -> None:
    for key in (KEY, OTHER, KEY):
        harness.process(("set", 1500), key)
    assert harness.advance(499) == []
    assert values(harness.advance(1)) == [("rang", KEY, 1500, 1500), ("rang", OTHER, 1500, 1500)]
    assert harness.advance(10_000) == []


def test_timers_ring_in_the_order_of_their_times_with_the_clock_at_their_time(harness: OperatorHarness) -> None:
    for at in (1700, 1500, 1600):
        harness.process(("set", at), KEY)
    assert [timer.timestamp for timer in harness.timers(PROCESSING)] == [1500, 1600, 1700]
    assert values(harness.advance(1000)) == [("rang", KEY, at, at) for at in (1500, 1600, 1700)]
    assert harness.clock.wall_ms() == 2000.0


def test_timers_ring_late_after_a_stall(harness: OperatorHarness) -> None:
    harness.process(("set", 1500), KEY)
    harness.process(("set", 1600), KEY)
    assert values(harness.stall(1000)) == [("rang", KEY, 1500, 2000), ("rang", KEY, 1600, 2000)]


def test_a_timer_of_the_past_rings_at_once_but_not_within_the_call(harness: OperatorHarness) -> None:
    assert harness.process(("set", 10), KEY) == []
    assert values(harness.advance(0)) == [("rang", KEY, 10, 1000)]


def test_what_a_timer_sets_comes_after_those_of_the_same_time_and_before_later_ones(harness: OperatorHarness) -> None:
    for at, key in ((1500, KEY), (1500, OTHER), (1501, KEY), (1502, KEY)):
        harness.process(("set", at), key)
    harness.process(("write", "again"), KEY)
    # It deletes the one at 1501 too.
    rang = [said[1:3] for said in values(harness.stall(1000))]
    assert rang == [(KEY, 1500), (OTHER, 1500), (KEY, 1500), (KEY, 1502)]


def test_what_an_event_time_timer_sets_or_deletes_comes_after_all_that_are_due(harness: OperatorHarness) -> None:
    harness.process(("set", 10, EVENT), KEY)
    harness.process(("set", 11, EVENT), KEY)
    harness.process(("write", "again"), KEY)
    assert [said[2] for said in values(harness.advance_watermark(20))] == [10, 11, 10]


def test_a_deleted_timer_does_not_ring(harness: OperatorHarness) -> None:
    for command in (("set", 1500), ("set", 1600), ("delete", 1500), ("delete", 1400)):
        harness.process(command, KEY)
    harness.process(("delete", 1600), OTHER)
    assert values(harness.advance(1000)) == [("rang", KEY, 1600, 1600)]


def test_event_time_timers_ring_with_the_watermark(harness: OperatorHarness) -> None:
    for at in (30, 20, 10, 20):
        harness.process(("set", at, EVENT), KEY)
    assert harness.advance(10_000) == []
    assert values(harness.advance_watermark(20)) == [("rang", KEY, 10, 20), ("rang", KEY, 20, 20)]
    harness.process(("set", 15, EVENT), KEY)
    assert values(harness.advance_watermark(21)) == [("rang", KEY, 15, 21)]


def test_at_the_end_of_input_event_time_timers_ring_and_processing_time_timers_do_not(
    harness: OperatorHarness,
) -> None:
    harness.process(("set", 1500), KEY)
    harness.process(("set", END_OF_TIME, EVENT), KEY)
    harness.process(("write", "again"), KEY)
    # A due timer that is set meanwhile fires too: Flink continues until there is none.
    assert values(harness.end_input()) == [("rang", KEY, END_OF_TIME, END_OF_TIME)] * 2
    assert harness.timers(PROCESSING) == []
    assert harness.advance(10_000) == []
    with pytest.raises(AssertionError, match="end of input"):
        harness.process(("say",), KEY)


def test_one_timer_can_be_rung_out_of_its_time(harness: OperatorHarness) -> None:
    harness.process(("set", 1500), KEY)
    harness.clock.advance(-900)
    (timer,) = harness.timers(PROCESSING)
    assert values(harness.fire(timer)) == [("rang", KEY, 1500, 100)]
    assert harness.timers(PROCESSING) == []


# Checkpoints.


def test_a_checkpoint_does_not_change_with_what_comes_after_it(harness: OperatorHarness) -> None:
    harness.process(("write", ["x"]), KEY)
    harness.process(("set", 1500), KEY)
    snapshot = harness.snapshot()
    harness.process(("forget",), KEY)
    harness.process(("write", ["y"]), KEY)
    harness.advance(1000)
    before = function_of(harness)
    harness.crash()
    assert before.calls[-1] != "close"
    assert values(harness.process(("read",), KEY)) == [None, [], {}]
    harness.restore(snapshot)
    assert values(harness.process(("read",), KEY)) == [["x"], [["x"]], {"place": ["x"]}]
    assert function_of(harness) is not before
    # Its time passed while the job was down.
    assert values(harness.advance(0)) == [("rang", KEY, 1500, 2000)]


def test_a_checkpoint_may_come_before_java_hears_of_the_last_timers(harness: OperatorHarness) -> None:
    harness.process(("set", 1500), KEY)
    harness.process(("set", 1600), KEY)
    harness.process(("set", 1500), KEY)
    # The second time it was set already.
    assert harness.timers_on_their_way == []
    harness.process(("set", 1700), KEY)
    assert [timer.timestamp for timer in harness.timers_on_their_way] == [1700]
    harness.restore(harness.snapshot().without(*harness.timers_on_their_way))
    assert [said[2] for said in values(harness.advance(1000))] == [1500, 1600]


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_keys_go_with_their_state_and_timers_to_one_subtask_at_another_parallelism(before: int, after: int) -> None:
    def subtasks(parallelism: int) -> list[OperatorHarness]:
        return [OperatorHarness(Obedient, parallelism=parallelism, subtask=one) for one in range(parallelism)]

    old, new = subtasks(before), subtasks(after)
    for key in range(12):
        harness = old[subtask_of(key, before)]
        harness.process(("write", key), key)
        harness.process(("set", 100 + key), key)
    whole = Snapshot.of_all(harness.snapshot() for harness in old)
    for harness in new:
        harness.restore(whole)
    rang = [(said[1], said[2]) for harness in new for said in values(harness.advance(1000))]
    assert sorted(rang) == [(key, 100 + key) for key in range(12)]
    for key in range(12):
        assert new[subtask_of(key, after)].state("value", key) == key
        for harness in new:
            if harness.subtask != subtask_of(key, after):
                with pytest.raises(AssertionError, match="does not lead"):
                    harness.process(("read",), key)


def test_keys_lead_where_flink_says() -> None:
    # Of KeyGroupRangeAssignment in Flink 2.3, for rows of one INT: key, group of 128, subtask of 2, of 3, of 4.
    said_by_flink = [
        (0, 33, 0, 0, 1),
        (1, 44, 0, 1, 1),
        (2, 97, 1, 2, 3),
        (3, 104, 1, 2, 3),
        (4, 17, 0, 0, 0),
        (8, 80, 1, 1, 2),
        (100, 66, 1, 1, 2),
        (12345, 80, 1, 1, 2),
        (-1, 62, 0, 1, 1),
        (-77, 126, 1, 2, 3),
        (2147483647, 59, 0, 1, 1),
        (-2147483648, 122, 1, 2, 3),
    ]
    keys = [row[0] for row in said_by_flink]
    assert [(key, key_group(key), *(subtask_of(key, count) for count in (2, 3, 4))) for key in keys] == said_by_flink


# Metrics.


def test_metrics_are_recorded_by_name_but_for_what_is_counted_in_open(harness: OperatorHarness) -> None:
    for _ in range(3):
        harness.process(("say",), KEY)
    assert harness.metrics.counts == {"mine.calls": 3}
    assert harness.metrics.gauge("calls") == 4

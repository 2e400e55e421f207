"""The Flink side of the operators: callbacks are translated, decisions are made elsewhere.

Rows of two strings leave them, `key` and `value`, for the topic that their stream leads to.
"""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

from pyflink.common import Row, Types
from pyflink.datastream import KeyedProcessFunction, OutputTag, ProcessFunction, RuntimeContext
from pyflink.datastream.state import ListState, ListStateDescriptor, MapState, MapStateDescriptor

from core.clock import Clock, SystemClock
from core.config import Batching, JobConfig, KafkaConfig
from core.records import DeadLetter, Response
from operators.answered_log import AnsweredLog
from operators.batching import MicroBatcher, Standing
from operators.decoding import Decoder
from operators.deduplicator import Deduplicator
from operators.envelope import Answer, Envelope, Source, WarmUp
from operators.journal import Record
from operators.kafka_journal import KafkaJournal
from operators.load_board import LoadBoard, LoadReport, LoadView
from operators.metrics import SlotMetrics, slot_metrics
from operators.metrics_endpoint import MetricsEndpoint
from operators.placement import BalancedPlacement, Placing, SessionAffinity
from operators.pump import Pump
from operators.supervisor import Supervisor

KEY_VALUE = Types.ROW_NAMED(["key", "value"], [Types.STRING(), Types.STRING()])
DEAD_LETTERS = OutputTag("dead-letters", KEY_VALUE)
READY = OutputTag("ready", KEY_VALUE)
END_OF_INPUT = 2**63 - 1
"""Event time that comes when a bounded input ends and on drain, where pending processing-time timers are dropped."""


WARM_UP = -1
"""The partition of a row that calls a slot to warm up; the slot stands in place of the offset."""
SPARE_TIMER_MS = 1000
"""From its first element on a key has a timer at each of the next two of these intervals. The later one has just been
set: it is on its way to Java, and in no checkpoint that is taken meanwhile. Without the other, what is in flight would
wait after a restart until another request comes. Where nothing is, they open the function after a restart all the same,
and so load the model."""
POLL_S = 0.025
"""Longest wait for an answer while the stream stands still: a request that comes meanwhile waits as long."""
FULL_POLL_S = 0.1
"""The same where every row is taken: one that comes cannot begin before another has finished, which ends the wait."""


class DecodeFunction(ProcessFunction):
    """Rows of `(value, partition, offset)` in; envelopes and calls to warm up out, dead letters to the side."""

    def __init__(self, config: JobConfig, make_journal: Callable[[KafkaConfig], KafkaJournal] = KafkaJournal) -> None:
        self._config = config
        self._make_journal = make_journal

    def open(self, runtime_context: RuntimeContext) -> None:
        self._opened = ExitStack()
        slots = self._config.parallelism
        board = LoadBoard.of(self._config)
        if board is None:
            placement: Placing = SessionAffinity(slots)
        else:
            loads = self._opened.enter_context(closing(LoadView(board)))
            placement = BalancedPlacement(slots, self._config.placing, loads)
        copies = None
        if self._config.delivery.dedup_records:
            journal = self._opened.enter_context(closing(self._make_journal(self._config.kafka)))
            copies = Deduplicator(self._config.delivery.dedup_records, journal)
        self._decoder = Decoder(placement, SystemClock(), copies)
        self._metrics = slot_metrics(runtime_context.get_index_of_this_subtask())

    def close(self) -> None:
        _close(self)

    def process_element(self, value: Row, ctx: ProcessFunction.Context) -> Iterator[Any]:
        raw, partition, offset = value
        if partition == WARM_UP:
            yield WarmUp(offset)
            return
        source = Source(self._config.kafka.requests_topic, partition, offset)
        decoded = self._decoder.decode(None if raw is None else bytes(raw), source)
        if isinstance(decoded, DeadLetter):
            self._metrics.answered(decoded)
            yield DEAD_LETTERS, _dead_letter_row(decoded)
        elif decoded is None:
            self._metrics.duplicates.inc()
        else:
            yield decoded


def inference_function(config: JobConfig) -> KeyedProcessFunction:
    """The inference operator for the kind of batching that `config` names."""
    kinds = {Batching.MICRO: MicroBatchFunction, Batching.CONTINUOUS: ContinuousFunction}
    return kinds[config.batching.batching](config)


class SlotFunction(KeyedProcessFunction):
    """What both ways to batch share: the slot, what was answered before a restart, and the ready record.

    Slot, clock and journal are made where the function is opened, which is in another process.
    """

    def __init__(
        self,
        config: JobConfig,
        make_slot: Callable[[JobConfig, int, Clock, SlotMetrics], Supervisor] = Supervisor,
        make_clock: Callable[[], Clock] = SystemClock,
        make_journal: Callable[[KafkaConfig], KafkaJournal] = KafkaJournal,
    ) -> None:
        self._config = config
        self._make_slot = make_slot
        self._make_clock = make_clock
        self._make_journal = make_journal

    def open(self, runtime_context: RuntimeContext) -> None:
        self._clock = self._make_clock()
        self._opened = ExitStack()
        # First of all: what comes to the topic from now on has been seen by nobody.
        journal = self._opened.enter_context(closing(self._make_journal(self._config.kafka)))
        self._answered = AnsweredLog(self._config.kafka, self._config.delivery.clock_margin_ms, journal)
        index = runtime_context.get_index_of_this_subtask()
        self._metrics = slot_metrics(index)
        _show(self._metrics, runtime_context)
        if self._config.metrics.metrics_port:
            address = (self._config.metrics.metrics_host, self._config.metrics.metrics_port + index)
            self._opened.enter_context(closing(MetricsEndpoint(*address, self._metrics.registry)))
        slot = self._make_slot(self._config, index, self._clock, self._metrics)
        self._slot = self._opened.enter_context(closing(slot))
        self._restored: set[int] = set()
        self._said_ready = False
        self._spare_intervals: dict[int, int] = {}
        """The interval that a key's spare timers were set in last."""

    def close(self) -> None:
        _close(self)

    def process_element(self, value: Envelope | WarmUp, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        self._set_spare_timers(ctx)
        yield from self._say_ready()
        if isinstance(value, WarmUp):
            return
        again = self._answered_before(value)
        yield from self._take_in(value, ctx) if again is None else again

    def _say_ready(self) -> Iterator[Any]:
        """Whatever came first has opened this function, and so has loaded the model."""
        if not self._said_ready:
            self._said_ready = True
            ready = self._slot.ready
            yield READY, Row(f"slot-{ready.slot}", ready.model_dump_json())

    def on_timer(self, timestamp: int, ctx: KeyedProcessFunction.OnTimerContext) -> Iterator[Any]:
        if timestamp != END_OF_INPUT:
            self._set_spare_timers(ctx)
        yield from self._say_ready()
        yield from self._look(timestamp, ctx)

    def _set_spare_timers(self, ctx: KeyedProcessFunction.Context) -> None:
        key, interval = ctx.get_current_key(), int(self._clock.wall_ms()) // SPARE_TIMER_MS
        if self._spare_intervals.get(key) != interval:
            self._spare_intervals[key] = interval
            for ahead in (1, 2):
                ctx.timer_service().register_processing_time_timer((interval + ahead) * SPARE_TIMER_MS)
            ctx.timer_service().register_event_time_timer(END_OF_INPUT)

    def _answered_before(self, envelope: Envelope) -> list[Any] | None:
        """None where no earlier attempt of the job has answered it; else what is to be written again, if anything."""
        again = self._answered.look(envelope)
        if again is None:
            return None
        self._metrics.duplicates.inc()
        return [self._row_again(record) for record in again]

    def _row_again(self, record: Record) -> Any:
        """What was written before, byte for byte."""
        row = Row((record.key or b"").decode(), (record.value or b"").decode())
        return (DEAD_LETTERS, row) if record.partition.topic == self._config.kafka.dead_letters_topic else row

    def _again(self, envelope: Envelope) -> Envelope:
        """As it is handed in after a restart: the time that the job was down counts for no time-out."""
        return replace(envelope, decoded_at_ms=self._clock.wall_ms())

    @abstractmethod
    def _take_in(self, envelope: Envelope, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        """Take a request in; what may leave with that."""

    @abstractmethod
    def _look(self, timestamp: int, ctx: KeyedProcessFunction.OnTimerContext) -> Iterator[Any]:
        """What may leave as a timer rings, a spare one included."""


class ContinuousFunction(SlotFunction):
    """Envelopes of one slot in; each response out as soon as it is there, dead letters and the ready record aside.

    What is in flight is in Flink's state as well, so that a restart loses nothing: it is asked again. Answers leave
    under the key that their request came with, as state belongs to a key: after a restart at another parallelism a
    subtask may hold several.
    """

    def open(self, runtime_context: RuntimeContext) -> None:
        super().open(runtime_context)
        most = self._config.batching.max_in_flight
        self._pump = self._opened.enter_context(closing(Pump(self._slot, most, self._clock)))
        self._in_flight: MapState = runtime_context.get_map_state(
            MapStateDescriptor("in-flight", Types.STRING(), Types.PICKLED_BYTE_ARRAY())
        )
        self._watched: set[int] = set()
        """Keys that a timer is set for."""

    def _take_in(self, envelope: Envelope, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        yield from self._restore(ctx)
        self._in_flight.put(_ticket(envelope.source), envelope)
        yield from self._submit(envelope, ctx)
        yield from self._leave(ctx, 0.0)

    def _look(self, timestamp: int, ctx: KeyedProcessFunction.OnTimerContext) -> Iterator[Any]:
        yield from self._restore(ctx)
        key = ctx.get_current_key()
        if timestamp == END_OF_INPUT:
            while self._pump.outstanding(key):
                yield from self._leave(ctx, POLL_S)
            return
        self._watched.discard(key)
        if not self._pump.outstanding(key):
            return
        # An answer under another key, as there may be after a restart, would not end the wait.
        full = self._pump.outstanding(key) >= self._config.engine.max_running
        # An answer that comes while this waits leaves at once. Fewer looks leave more of the cores to engines.
        yield from self._leave(ctx, FULL_POLL_S if full else POLL_S)

    def _leave(self, ctx: KeyedProcessFunction.Context, timeout_s: float) -> Iterator[Any]:
        """What has finished under the current key; as long as more is in flight there, a timer looks again."""
        key = ctx.get_current_key()
        for envelope in self._pump.retried(key):
            self._in_flight.put(_ticket(envelope.source), envelope)
        for answer in self._pump.take(key, timeout_s):
            self._in_flight.remove(_ticket(answer.source))
            self._metrics.answered(answer.record)
            yield _row(answer)
        if self._pump.outstanding(key) and key not in self._watched:
            self._watched.add(key)
            ctx.timer_service().register_processing_time_timer(int(self._clock.wall_ms()) + 1)

    def _submit(self, envelope: Envelope, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        # The only wait: it holds the stream, and with it Kafka, while the slot has all that it may have.
        while not self._pump.wait_for_room(POLL_S):
            yield from self._leave(ctx, 0.0)
        self._pump.submit(ctx.get_current_key(), envelope)

    def _restore(self, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        """After a restart, what was in flight and has not been answered is asked again, before anything newer."""
        key = ctx.get_current_key()
        if key in self._restored:
            return
        self._restored.add(key)
        waiting = (envelope for _, envelope in self._in_flight.items())
        for envelope in sorted(waiting, key=lambda one: (one.source.partition, one.source.offset)):
            again = self._answered_before(envelope)
            if again is None:
                yield from self._submit(self._again(envelope), ctx)
            else:
                self._in_flight.remove(_ticket(envelope.source))
                yield from again


class MicroBatchFunction(SlotFunction):
    """Envelopes of one slot in; responses out, dead letters and the ready record to the side.

    What waits for its batch is in Flink's state as well as in memory, so that a restart loses nothing.
    """

    def open(self, runtime_context: RuntimeContext) -> None:
        super().open(runtime_context)
        batching = self._config.batching
        self._stood = Standing(self._clock)
        board = LoadBoard.of(self._config)
        if board is not None:
            self._opened.enter_context(closing(LoadReport(board, self._slot.ready.slot, lambda: self._stood.queue_ms)))
        self._batchers: defaultdict[int, MicroBatcher[Envelope]] = defaultdict(
            lambda: MicroBatcher(batching.batch_size, batching.max_wait_ms)
        )
        """By key: a batch leaves under the key whose state holds its requests."""
        self._pending: ListState = runtime_context.get_list_state(
            ListStateDescriptor("pending", Types.PICKLED_BYTE_ARRAY())
        )

    def _take_in(self, envelope: Envelope, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        self._stood.taken(envelope.decoded_at_ms)
        yield from self._restore(ctx)
        yield from self._add(envelope, ctx)

    def _look(self, timestamp: int, ctx: KeyedProcessFunction.OnTimerContext) -> Iterator[Any]:
        yield from self._restore(ctx)
        batcher = self._batchers[ctx.get_current_key()]
        at_end = timestamp == END_OF_INPUT
        # Flink's timers count a delay: should the wall clock be set back meanwhile, the timer is right.
        batch = batcher.flush() if at_end else batcher.expire(max(self._clock.wall_ms(), timestamp))
        yield from self._answer(batch)

    def _restore(self, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        """After a restart, what waited in state joins the batch again, before anything newer."""
        if ctx.get_current_key() in self._restored:
            return
        self._restored.add(ctx.get_current_key())
        waiting = list(self._pending.get() or ())
        self._pending.clear()
        for envelope in waiting:
            again = self._answered_before(envelope)
            yield from self._add(self._again(envelope), ctx) if again is None else again

    def _add(self, envelope: Envelope, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        batcher = self._batchers[ctx.get_current_key()]
        first = len(batcher) == 0
        batch = batcher.add(envelope, self._clock.wall_ms())
        if batch:
            yield from self._answer(batch)
            return
        self._pending.add(envelope)
        if first and batcher.due_ms is not None:
            # One millisecond later, as a timer is whole milliseconds and must not come too early.
            ctx.timer_service().register_processing_time_timer(int(batcher.due_ms) + 1)

    def _answer(self, batch: list[Envelope]) -> Iterator[Any]:
        if not batch:
            return
        self._pending.clear()
        with self._stood.busy():
            answers = self._slot.answer(batch)
        for answer in answers:
            self._metrics.answered(answer.record)
            yield _row(answer)


def _close(function: DecodeFunction | SlotFunction) -> None:
    """Close what was opened, the last first. Flink closes what it could not open, too."""
    if hasattr(function, "_opened"):
        function._opened.close()


def _show(metrics: SlotMetrics, runtime_context: RuntimeContext) -> None:
    """Put the gauges into Flink's own metrics; there are none where they are switched off."""
    group = runtime_context.get_metrics_group()
    if group is not None:
        for name, read in metrics.whole_gauges().items():
            group.gauge(name, read)


def _ticket(source: Source) -> str:
    return f"{source.partition}-{source.offset}"


def _row(answer: Answer) -> Any:
    record = answer.record
    if isinstance(record, Response):
        return Row(record.request_id, record.to_json())
    return DEAD_LETTERS, _dead_letter_row(record)


def _dead_letter_row(letter: DeadLetter) -> Row:
    place = f"{letter.topic}-{letter.partition}-{letter.offset}"
    return Row(letter.request_id or place, letter.to_json())

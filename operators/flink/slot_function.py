"""The base of both inference operators: the slot, recovery after a restart, and the ready record."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

from pyflink.common import Row
from pyflink.datastream import KeyedProcessFunction, RuntimeContext

from core.clock import Clock, SystemClock
from core.kafka_config import KafkaConfig
from operators.config import JobConfig
from operators.delivery.answered_log import AnsweredLog
from operators.delivery.kafka_journal import KafkaJournal
from operators.envelope import Envelope, WarmUp
from operators.flink.beam_worker import make_lean
from operators.flink.rows import READY, element_of, written_row
from operators.flink.user_errors import UserErrors
from operators.metrics.endpoint import MetricsEndpoint
from operators.metrics.slot_metrics import SlotMetrics, slot_metrics
from operators.slots.supervisor import Supervisor

END_OF_INPUT = 2**63 - 1
"""Event time at the end of a bounded input, and on drain, where Flink drops pending processing-time timers."""
RECOVERY_TIMER_MS = 1000
"""Interval of the recovery timers. From its first element on, a key always has timers at the next two intervals.

A checkpoint does not contain a timer that has just been set, because it is still on its way to Java. With a single
timer, requests in flight could wait after a restart until another request comes. The timers also open the function
after a restart, which loads the model, even if nothing is in flight.
"""
FAR_TIMER_MS = 60_000
"""Interval of two further timers, for a worker that is suspended until both nearer timers are past. Their successors
are on their way to Java when it resumes."""


class SlotFunction(KeyedProcessFunction):
    """The base of both inference operators: the slot, recovery after a restart, and the ready record.

    Slot, clock and journal are made when the function is opened, which happens in another process.
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
        self._opened = ExitStack()
        """Closed in reverse order. Flink also closes a function whose `open` failed."""
        self._errors = UserErrors()

    def open(self, runtime_context: RuntimeContext) -> None:
        with self._errors.noted():
            self._open(runtime_context)

    def _open(self, runtime_context: RuntimeContext) -> None:
        make_lean()
        self._clock = self._make_clock()
        # This must come first: no earlier attempt has seen what comes to the topic from now on.
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
        self._recovery_intervals: dict[int, int] = {}
        """By key, the interval of `RECOVERY_TIMER_MS` in which its recovery timers were last set."""
        self._opened_ms = self._clock.wall_ms()

    def close(self) -> None:
        self._opened.close()

    def process_element(self, value: bytes, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        return self._errors.told(lambda: self._process(element_of(value), ctx))

    def on_timer(self, timestamp: int, ctx: KeyedProcessFunction.OnTimerContext) -> Iterator[Any]:
        return self._errors.told(lambda: self._ring(timestamp, ctx))

    def _process(self, value: Envelope | WarmUp, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        self._set_recovery_timers(ctx)
        yield from self._say_ready()
        if isinstance(value, WarmUp):
            return
        again = self._answered_before(value)
        yield from self._take_in(self._since_opened(value), ctx) if again is None else again

    def _say_ready(self) -> Iterator[Any]:
        """Emit the ready record once. The first element or timer has opened this function, which loads the model."""
        if not self._said_ready:
            self._said_ready = True
            ready = self._slot.ready
            yield READY, Row(f"slot-{ready.slot}", ready.model_dump_json())

    def _ring(self, timestamp: int, ctx: KeyedProcessFunction.OnTimerContext) -> Iterator[Any]:
        if timestamp != END_OF_INPUT:
            self._set_recovery_timers(ctx)
        yield from self._say_ready()
        yield from self._look(timestamp, ctx)

    def _set_recovery_timers(self, ctx: KeyedProcessFunction.Context) -> None:
        key, now_ms = ctx.get_current_key(), int(self._clock.wall_ms())
        interval = now_ms // RECOVERY_TIMER_MS
        if self._recovery_intervals.get(key) == interval:
            return
        self._recovery_intervals[key] = interval
        for length_ms in (RECOVERY_TIMER_MS, FAR_TIMER_MS):
            for ahead in (1, 2):
                ctx.timer_service().register_processing_time_timer((now_ms // length_ms + ahead) * length_ms)
        ctx.timer_service().register_event_time_timer(END_OF_INPUT)

    def _answered_before(self, envelope: Envelope) -> list[Any] | None:
        """None if no earlier attempt of the job has answered it. Otherwise the rows to write again, maybe none."""
        again = self._answered.look(envelope)
        if again is None:
            return None
        self._metrics.duplicates.inc()
        return [written_row(record, self._config.kafka.dead_letters_topic) for record in again]

    def _since_opened(self, envelope: Envelope) -> Envelope:
        """The same envelope, decoded no earlier than this attempt began.

        So the time in which the job was down, or loaded its models, does not count for time-outs. Earlier requests come
        from this operator's state and, under back pressure, from records in flight in a checkpoint.
        """
        if envelope.decoded_at_ms >= self._opened_ms:
            return envelope
        return replace(envelope, decoded_at_ms=self._opened_ms)

    @abstractmethod
    def _take_in(self, envelope: Envelope, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        """Take a request in, and emit the answers that are there."""

    @abstractmethod
    def _look(self, timestamp: int, ctx: KeyedProcessFunction.OnTimerContext) -> Iterator[Any]:
        """A timer fires, maybe a recovery timer: emit the answers that are there."""


def _show(metrics: SlotMetrics, runtime_context: RuntimeContext) -> None:
    """Register the gauges with Flink's own metrics, unless these are switched off."""
    group = runtime_context.get_metrics_group()
    if group is not None:
        for name, read in metrics.flink_gauges().items():
            group.gauge(name, read)

"""What both ways to batch share: the slot, what was answered before a restart, spare timers, and the ready record."""

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
"""Event time that comes when a bounded input ends and on drain, where pending processing-time timers are dropped."""
RECOVERY_TIMER_MS = 1000
"""From its first element on a key has a timer at each of the next two of these intervals. The later one has just been
set: it is on its way to Java, and in no checkpoint that is taken meanwhile. Without the other, what is in flight would
wait after a restart until another request comes. Where nothing is, they open the function after a restart all the same,
and so load the model."""
FAR_TIMER_MS = 60_000
"""The same further ahead, for a worker that stands still until both spare ones are over. Their successors are on their
way when it goes on."""


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
        self._opened = ExitStack()
        """Closed in the reverse order. Flink closes what it could not open, too."""
        self._errors = UserErrors()

    def open(self, runtime_context: RuntimeContext) -> None:
        with self._errors.noted():
            self._open(runtime_context)

    def _open(self, runtime_context: RuntimeContext) -> None:
        make_lean()
        self._clock = self._make_clock()
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
        self._recovery_intervals: dict[int, int] = {}
        """The interval of `RECOVERY_TIMER_MS` that a key's spare timers were set in last."""
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
        """Whatever came first has opened this function, and so has loaded the model."""
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
        """None where no earlier attempt of the job has answered it; else what is to be written again, if anything."""
        again = self._answered.look(envelope)
        if again is None:
            return None
        self._metrics.duplicates.inc()
        return [written_row(record, self._config.kafka.dead_letters_topic) for record in again]

    def _since_opened(self, envelope: Envelope) -> Envelope:
        """As of this attempt: the time in which the job was down, or loaded its models, counts for no time-out.

        A checkpoint holds requests of before in this operator's state and, under back pressure, on their way to it.
        """
        if envelope.decoded_at_ms >= self._opened_ms:
            return envelope
        return replace(envelope, decoded_at_ms=self._opened_ms)

    @abstractmethod
    def _take_in(self, envelope: Envelope, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        """Take a request in; what may leave with that."""

    @abstractmethod
    def _look(self, timestamp: int, ctx: KeyedProcessFunction.OnTimerContext) -> Iterator[Any]:
        """What may leave as a timer rings, a spare one included."""


def _show(metrics: SlotMetrics, runtime_context: RuntimeContext) -> None:
    """Put the gauges into Flink's own metrics; there are none where they are switched off."""
    group = runtime_context.get_metrics_group()
    if group is not None:
        for name, read in metrics.flink_gauges().items():
            group.gauge(name, read)

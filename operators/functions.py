"""The Flink side of the operators: callbacks are translated, decisions are made elsewhere.

Rows of two strings leave them, `key` and `value`, for the topic that their stream leads to.
"""

from collections.abc import Iterator
from typing import Any

from pyflink.common import Row, Types
from pyflink.datastream import KeyedProcessFunction, OutputTag, ProcessFunction, RuntimeContext
from pyflink.datastream.state import ListState, ListStateDescriptor

from core.clock import SystemClock
from core.config import JobConfig
from core.records import DeadLetter, Response
from operators.batching import MicroBatcher
from operators.decoding import Decoder
from operators.envelope import Envelope, Source, WarmUp
from operators.placement import SessionAffinity
from operators.slot import InferenceSlot

KEY_VALUE = Types.ROW_NAMED(["key", "value"], [Types.STRING(), Types.STRING()])
DEAD_LETTERS = OutputTag("dead-letters", KEY_VALUE)
READY = OutputTag("ready", KEY_VALUE)
END_OF_INPUT = 2**63 - 1
"""Event time that comes when a bounded input ends and on drain, where pending processing-time timers are dropped."""


WARM_UP = -1
"""The partition of a row that calls a slot to warm up; the slot stands in place of the offset."""


class DecodeFunction(ProcessFunction):
    """Rows of `(value, partition, offset)` in; envelopes and calls to warm up out, dead letters to the side."""

    def __init__(self, config: JobConfig) -> None:
        self._config = config

    def open(self, runtime_context: RuntimeContext) -> None:
        self._decoder = Decoder(SessionAffinity(self._config.parallelism), SystemClock())

    def process_element(self, value: Row, ctx: ProcessFunction.Context) -> Iterator[Any]:
        raw, partition, offset = value
        if partition == WARM_UP:
            yield WarmUp(offset)
            return
        source = Source(self._config.kafka.requests_topic, partition, offset)
        decoded = self._decoder.decode(None if raw is None else bytes(raw), source)
        if isinstance(decoded, DeadLetter):
            yield DEAD_LETTERS, _dead_letter_row(decoded)
        else:
            yield decoded


def inference_function(config: JobConfig) -> "KeyedProcessFunction":
    """The inference operator for the kind of batching that `config` names."""
    return MicroBatchFunction(config)


class MicroBatchFunction(KeyedProcessFunction):
    """Envelopes of one slot in; responses out, dead letters and the ready record to the side.

    What waits for its batch is in Flink's state as well as in memory, so that a restart loses nothing.
    """

    def __init__(self, config: JobConfig) -> None:
        self._config = config

    def open(self, runtime_context: RuntimeContext) -> None:
        self._clock = SystemClock()
        self._slot = InferenceSlot(self._config, runtime_context.get_index_of_this_subtask(), self._clock)
        batching = self._config.batching
        self._batcher: MicroBatcher[Envelope] = MicroBatcher(batching.batch_size, batching.max_wait_ms)
        self._pending: ListState = runtime_context.get_list_state(
            ListStateDescriptor("pending", Types.PICKLED_BYTE_ARRAY())
        )
        self._restored: set[int] = set()

    def close(self) -> None:
        # Flink closes what it could not open, too.
        if hasattr(self, "_slot"):
            self._slot.close()

    def process_element(self, value: Envelope | WarmUp, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        if isinstance(value, WarmUp):
            # The model was loaded when this function was opened for its first element: this one.
            ready = self._slot.ready
            yield READY, Row(f"slot-{ready.slot}", ready.model_dump_json())
            return
        yield from self._restore(ctx)
        yield from self._add(value, ctx)

    def on_timer(self, timestamp: int, ctx: KeyedProcessFunction.OnTimerContext) -> Iterator[Any]:
        yield from self._restore(ctx)
        at_end = timestamp == END_OF_INPUT
        # Flink's timers count a delay: should the wall clock be set back meanwhile, the timer is right.
        batch = self._batcher.flush() if at_end else self._batcher.expire(max(self._clock.wall_ms(), timestamp))
        yield from self._answer(batch)

    def _restore(self, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        """After a restart, what waited in state joins the batch again, before anything newer."""
        if ctx.get_current_key() in self._restored:
            return
        self._restored.add(ctx.get_current_key())
        waiting = list(self._pending.get() or ())
        self._pending.clear()
        for envelope in waiting:
            yield from self._add(envelope, ctx)

    def _add(self, envelope: Envelope, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        first = len(self._batcher) == 0
        batch = self._batcher.add(envelope, self._clock.wall_ms())
        if batch:
            yield from self._answer(batch)
            return
        self._pending.add(envelope)
        if first and self._batcher.due_ms is not None:
            # One millisecond later, as a timer is whole milliseconds and must not come too early.
            ctx.timer_service().register_processing_time_timer(int(self._batcher.due_ms) + 1)
            ctx.timer_service().register_event_time_timer(END_OF_INPUT)

    def _answer(self, batch: list[Envelope]) -> Iterator[Any]:
        if not batch:
            return
        self._pending.clear()
        for answer in self._slot.answer(batch):
            if isinstance(answer, Response):
                yield Row(answer.request_id, answer.to_json())
            else:
                yield DEAD_LETTERS, _dead_letter_row(answer)


def _dead_letter_row(letter: DeadLetter) -> Row:
    place = f"{letter.topic}-{letter.partition}-{letter.offset}"
    return Row(letter.request_id or place, letter.to_json())

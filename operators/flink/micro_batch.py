"""Micro-batches: requests wait until their batch is complete, and the engine answers it as a whole."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from pyflink.datastream import KeyedProcessFunction, RuntimeContext
from pyflink.datastream.state import ListState, ListStateDescriptor

from operators.batching import MicroBatcher, QueueDelay
from operators.envelope import Envelope
from operators.envelope_state import from_state, to_state
from operators.flink.rows import STORED, answer_row
from operators.flink.slot_function import END_OF_INPUT, SlotFunction
from operators.shared_state.slot_loads import LoadReporter, SharedLoads


class MicroBatchFunction(SlotFunction):
    """Takes envelopes of one slot, and emits responses. Dead letters leave by a side output.

    Requests that wait for their batch are in Flink's state as well as in memory, so a restart loses none.
    """

    def _open(self, runtime_context: RuntimeContext) -> None:
        super()._open(runtime_context)
        batching = self._config.batching
        self._queue_delay = QueueDelay(self._clock)
        loads = SharedLoads.of(self._config)
        if loads is not None:
            reporter = LoadReporter(loads, self._slot.ready.slot, lambda: self._queue_delay.queue_ms)
            self._opened.enter_context(closing(reporter))
        self._batchers: defaultdict[int, MicroBatcher[Envelope]] = defaultdict(
            lambda: MicroBatcher(batching.batch_size, batching.max_wait_ms)
        )
        """By key, because a batch leaves under the key whose state holds its requests."""
        self._pending: ListState = runtime_context.get_list_state(ListStateDescriptor("pending", STORED))

    def _take_in(self, envelope: Envelope, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        self._queue_delay.taken(envelope.decoded_at_ms)
        yield from self._restore(ctx)
        yield from self._add(envelope, ctx)

    def _look(self, timestamp: int, ctx: KeyedProcessFunction.OnTimerContext) -> Iterator[Any]:
        yield from self._restore(ctx)
        batcher = self._batchers[ctx.get_current_key()]
        at_end = timestamp == END_OF_INPUT
        # Flink's timers run by a delay. If the wall clock was set back meanwhile, the timer is right.
        batch = batcher.flush() if at_end else batcher.expire(max(self._clock.wall_ms(), timestamp))
        yield from self._answer(batch)

    def _restore(self, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        """After a restart, add the requests in state to the batch again, before any newer request."""
        if ctx.get_current_key() in self._restored:
            return
        self._restored.add(ctx.get_current_key())
        waiting = [from_state(stored) for stored in self._pending.get() or ()]
        self._pending.clear()
        for envelope in waiting:
            again = self._answered_before(envelope)
            yield from self._add(self._since_opened(envelope), ctx) if again is None else again

    def _add(self, envelope: Envelope, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        batcher = self._batchers[ctx.get_current_key()]
        first = len(batcher) == 0
        batch = batcher.add(envelope, self._clock.wall_ms())
        if batch:
            yield from self._answer(batch)
            return
        self._pending.add(to_state(envelope))
        if first and batcher.due_ms is not None:
            # Timers have whole milliseconds. One more, so that it does not fire too early.
            ctx.timer_service().register_processing_time_timer(int(batcher.due_ms) + 1)

    def _answer(self, batch: list[Envelope]) -> Iterator[Any]:
        if not batch:
            return
        self._pending.clear()
        with self._queue_delay.busy():
            answers = self._slot.answer(batch)
        for answer in answers:
            self._metrics.answered(answer.record)
            yield answer_row(answer)

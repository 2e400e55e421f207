"""Continuous batching: requests join the running batch at any step, and each answer leaves as soon as it is there."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

from pyflink.common import Types
from pyflink.datastream import KeyedProcessFunction, RuntimeContext
from pyflink.datastream.state import MapState, MapStateDescriptor

from operators.envelope import Envelope, RecordPosition
from operators.envelope_state import from_state, to_state
from operators.flink.rows import STORED, answer_row
from operators.flink.slot_function import END_OF_INPUT, SlotFunction
from operators.slots.pump import Pump

POLL_S = 0.025
"""Maximum wait for an answer. It blocks the stream, so a request that comes meanwhile waits too."""
FULL_POLL_S = 0.1
"""The same while all rows are taken: a new request cannot begin before an answer is there, which ends the wait."""


class ContinuousFunction(SlotFunction):
    """Takes envelopes of one slot, and emits each response when it is there. Dead letters leave by a side output.

    Requests in flight are in Flink's state too. After a restart they are submitted again. An answer leaves under the
    key of its request, because state belongs to a key. After a change of parallelism a subtask may have several keys.
    """

    def _open(self, runtime_context: RuntimeContext) -> None:
        super()._open(runtime_context)
        most, rows = self._config.batching.max_in_flight, self._config.engine.max_running
        self._pump = self._opened.enter_context(closing(Pump(self._slot, most, self._clock, rows)))
        self._in_flight: MapState = runtime_context.get_map_state(
            MapStateDescriptor("in-flight", Types.STRING(), STORED)
        )
        self._watched: dict[int, int] = {}
        """By key, the time of the next timer that collects its answers."""

    def _take_in(self, envelope: Envelope, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        yield from self._restore(ctx)
        self._in_flight.put(_ticket(envelope.position), to_state(envelope))
        yield from self._submit(envelope, ctx)
        yield from self._leave(ctx, 0.0)

    def _look(self, timestamp: int, ctx: KeyedProcessFunction.OnTimerContext) -> Iterator[Any]:
        yield from self._restore(ctx)
        key = ctx.get_current_key()
        if timestamp == END_OF_INPUT:
            while self._pump.outstanding(key):
                yield from self._leave(ctx, POLL_S)
            return
        # Timers fire in the order of their times. A recovery timer does not replace the one for the next look.
        if self._watched.get(key, timestamp) <= timestamp:
            self._watched.pop(key, None)
        if not self._pump.outstanding(key):
            return
        # Only requests of this key count: an answer under another key would not end the wait.
        full = self._pump.outstanding(key) >= self._config.engine.max_running
        # An answer that comes during this wait leaves at once. Fewer looks leave more CPU time to the engines.
        yield from self._leave(ctx, FULL_POLL_S if full else POLL_S)

    def _leave(self, ctx: KeyedProcessFunction.Context, timeout_s: float) -> Iterator[Any]:
        """Emit the answers of the current key, and set a timer for the next look if more requests are in flight."""
        key = ctx.get_current_key()
        for envelope in self._pump.retried(key):
            self._in_flight.put(_ticket(envelope.position), to_state(envelope))
        for answer in self._pump.take(key, timeout_s):
            self._in_flight.remove(_ticket(answer.position))
            self._metrics.answered(answer.record)
            yield answer_row(answer)
        if self._pump.outstanding(key) and key not in self._watched:
            self._watched[key] = int(self._clock.wall_ms()) + 1
            ctx.timer_service().register_processing_time_timer(self._watched[key])

    def _submit(self, envelope: Envelope, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        # Back pressure: this blocks the stream, and the Kafka source, while the slot has `max_in_flight` requests.
        while not self._pump.wait_for_capacity(POLL_S):
            yield from self._leave(ctx, 0.0)
        self._pump.submit(ctx.get_current_key(), envelope)

    def _restore(self, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        """After a restart, submit the unanswered requests in state again, before any newer request."""
        key = ctx.get_current_key()
        if key in self._restored:
            return
        self._restored.add(key)
        waiting = [from_state(stored) for _, stored in self._in_flight.items()]
        for envelope in sorted(waiting, key=lambda one: (one.position.partition, one.position.offset)):
            again = self._answered_before(envelope)
            if again is None:
                yield from self._submit(self._since_opened(envelope), ctx)
            else:
                self._in_flight.remove(_ticket(envelope.position))
                yield from again


def _ticket(position: RecordPosition) -> str:
    return f"{position.partition}-{position.offset}"

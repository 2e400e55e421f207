"""One subtask of a PyFlink function without a cluster: keyed state, timers, outputs, checkpoints, crashes.

It depends on the interface between PyFlink and its functions, and on no function of ours. If Flink leaves something
open (late timers, timers that a checkpoint misses), the test decides.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pyflink.common import TypeInformation, Types
from pyflink.datastream import KeyedProcessFunction, OutputTag, ProcessFunction, TimeDomain
from pyflink.fn_execution.beam.beam_coders import FlinkCoder
from pyflink.fn_execution.coders import from_type_info
from pyflink.fn_execution.datastream.process.process_function import (
    InternalKeyedProcessFunctionContext,
    InternalKeyedProcessFunctionOnTimerContext,
    InternalProcessFunctionContext,
)
from pyflink.fn_execution.datastream.process.runtime_context import StreamingRuntimeContext

from core.clock import ManualClock
from tests.operators.flink.key_groups import MAX_PARALLELISM, subtask_of
from tests.operators.flink.keyed_state import Key, KeyedState
from tests.operators.flink.metrics import RecordedGroup, RecordedMetrics
from tests.operators.flink.snapshot import NOTHING, Snapshot
from tests.operators.flink.timers import Timer, Timers

END_OF_TIME = 2**63 - 1
"""The watermark at the end of a bounded input, and on drain."""


@dataclass(frozen=True)
class Output:
    """An output and the current key. Without a tag it is of the main stream."""

    key: Key
    tag: str | None
    value: Any


class OperatorHarness:
    """Drives functions that `make` creates: one for the start, and one for each start after a crash.

    The function may share the clock. Calls return their outputs; `outputs` has all outputs, also of calls that raised.
    A function that has raised takes no more calls: call `close`, `crash` or `restore`.
    """

    def __init__(
        self,
        make: Callable[[], KeyedProcessFunction | ProcessFunction],
        clock: ManualClock | None = None,
        *,
        parallelism: int = 1,
        subtask: int = 0,
        output_type: TypeInformation | None = None,
    ) -> None:
        self.clock = clock or ManualClock()
        self.parallelism = parallelism
        self.subtask = subtask
        self.outputs: list[Output] = []
        self._make = make
        self._output_coder = _coder(output_type or Types.PICKLED_BYTE_ARRAY())
        self._begin(NOTHING)

    def _begin(self, snapshot: Snapshot) -> None:
        self.metrics = RecordedMetrics()
        self._state = KeyedState(snapshot.contents)
        self._timers = Timers(self.clock, self._state, snapshot.timers)
        self._function: Any = None
        """Made and opened with the first element or timer, as PyFlink does."""
        self._ended = False
        self._failed = False

    # What comes from upstream.

    def process(self, value: Any, key: Key = None, timestamp: int | None = None) -> list[Output]:
        """Process an element with its key; without a key if the function is not keyed."""
        assert not self._ended, "no element comes after the end of input"
        self._open()
        assert isinstance(self._function, KeyedProcessFunction) is (key is not None), "keys are for keyed functions"
        if key is None:
            ctx: Any = InternalProcessFunctionContext(self._timers)
        else:
            assert subtask_of(key, self.parallelism) == self.subtask, f"key {key} does not lead to this subtask"
            ctx = InternalKeyedProcessFunctionContext(self._timers)
            ctx.set_current_key(key)
        ctx.set_timestamp(timestamp)
        self._timers.depart()
        return self._call(key, self._function.process_element, _copied(value, _PICKLING), ctx)

    def advance_watermark(self, to_ms: int) -> list[Output]:
        """Fire every event-time timer due at this watermark, including timers that are set meanwhile."""
        out: list[Output] = []
        self._timers.advance_watermark(to_ms)
        while due := self._timers.take_due(TimeDomain.EVENT_TIME, to_ms):
            out += self._ring(due)
        return out

    def end_input(self) -> list[Output]:
        """End a bounded input, or drain the job: the last watermark comes, and no more processing-time timers fire."""
        out = self.advance_watermark(END_OF_TIME)
        self._timers.take_due(TimeDomain.PROCESSING_TIME, END_OF_TIME)
        self._ended = True
        return out

    # Time.

    def advance(self, by_ms: float) -> list[Output]:
        """Let time pass. Each processing-time timer fires at its time, or at once if that has passed.

        Timers of the same time fire together; timers that they set are set before the next ones fire.
        """
        out: list[Output] = []
        until_ms = self.clock.wall_ms() + by_ms
        while (pending := self.timers(TimeDomain.PROCESSING_TIME)) and pending[0].timestamp <= until_ms:
            self.clock.advance(max(0.0, pending[0].timestamp - self.clock.wall_ms()))
            out += self._ring(self._timers.take_due(TimeDomain.PROCESSING_TIME, pending[0].timestamp))
        self.clock.advance(max(0.0, until_ms - self.clock.wall_ms()))
        return out

    def stall(self, by_ms: float) -> list[Output]:
        """Let time pass in which nothing runs; processing-time timers that have become due fire late."""
        self.clock.advance(by_ms)
        return self.advance(0.0)

    def fire(self, timer: Timer) -> list[Output]:
        """Fire one timer, whatever the clock shows: Flink counts down a delay, and a wall clock may be set back."""
        self._timers.take(timer)
        return self._ring([timer])

    def timers(self, domain: TimeDomain) -> list[Timer]:
        """All timers that have not fired, the next one first."""
        return self._timers.pending(domain)

    @property
    def timers_on_their_way(self) -> list[Timer]:
        """Timers set by the last element, or by the timers that fired together last.

        PyFlink 2.3 registers them after the bundle has ended, and a checkpoint does not wait for that.
        """
        return list(self._timers.on_their_way)

    # State and its ends.

    def state(self, name: str, key: int) -> Any:
        """The content of a state under a key: a value, a list or a dictionary."""
        return self._state.read(name, key)

    @property
    def holds_nothing(self) -> bool:
        """True if all state is empty."""
        return not self._state.contents

    def snapshot(self) -> Snapshot:
        """Take a checkpoint between two calls."""
        assert not self._failed, "there is no checkpoint of what has failed"
        timers = [timer for domain in TimeDomain for timer in self.timers(domain)]
        return Snapshot(dict(self._state.contents), tuple(timers))

    def crash(self) -> None:
        """The worker dies: the function is not closed, and all that is not in a checkpoint is lost."""
        self._begin(NOTHING)

    def restore(self, snapshot: Snapshot) -> None:
        """Start again with this subtask's part of a checkpoint of any parallelism. Time has continued."""
        self._begin(snapshot.of_subtask(self.subtask, self.parallelism))

    def close(self) -> None:
        """Close the function, as Flink does even if it could not be opened or has failed."""
        if self._function is not None:
            self._function.close()
        self._begin(NOTHING)

    # Calls of the function.

    def _open(self) -> None:
        assert not self._failed, "it has failed: Flink would begin anew"
        if self._function is not None:
            return
        self._function = self._make()
        context = StreamingRuntimeContext(
            task_name="function",
            task_name_with_subtasks=f"function ({self.subtask + 1}/{self.parallelism})",
            number_of_parallel_subtasks=self.parallelism,
            max_number_of_parallel_subtasks=MAX_PARALLELISM,
            index_of_this_subtask=self.subtask,
            attempt_number=0,
            job_parameters={},
            metric_group=RecordedGroup(self.metrics),
            keyed_state_backend=self._state if isinstance(self._function, KeyedProcessFunction) else None,
            in_batch_execution_mode=False,
        )
        with self._noting_failure():
            self._function.open(context)

    def _ring(self, timers: list[Timer]) -> list[Output]:
        out: list[Output] = []
        self._timers.depart()
        for timer in timers:
            self._open()
            ctx = InternalKeyedProcessFunctionOnTimerContext(self._timers)
            ctx.set_current_key(timer.key)
            ctx.set_timestamp(timer.timestamp)
            ctx.set_time_domain(timer.domain)
            out += self._call(timer.key, self._function.on_timer, timer.timestamp, ctx)
        return out

    def _call(self, key: Key, method: Callable[..., Iterable[Any] | None], *arguments: Any) -> list[Output]:
        before = len(self.outputs)
        self._state.current_key = key
        with self._noting_failure(), self.metrics.counting():
            for result in method(*arguments) or ():
                self.outputs.append(self._output(key, result))
        return self.outputs[before:]

    def _output(self, key: Key, result: Any) -> Output:
        """Distinguish outputs as PyFlink does; a value that does not fit its stream's type fails."""
        if isinstance(result, tuple) and isinstance(result[0], OutputTag):
            tag, value = result
            return Output(key, tag.tag_id, _copied(value, _coder(tag.type_info)))
        return Output(key, None, _copied(result, self._output_coder))

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._failed = True
            raise


def _coder(type_info: TypeInformation) -> FlinkCoder:
    return FlinkCoder(from_type_info(type_info))


def _copied(value: Any, coder: FlinkCoder) -> Any:
    return coder.decode(coder.encode(value))


_PICKLING = _coder(Types.PICKLED_BYTE_ARRAY())

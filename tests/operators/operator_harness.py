"""One subtask of a PyFlink function without a cluster: keyed state, timers, outputs, checkpoints, crashes.

It knows no function of ours, only what PyFlink calls and what functions call of PyFlink. Where Flink leaves something
open (timers that ring late, timers that a checkpoint does not hold) the test decides.
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
"""The watermark that comes when a bounded input ends, and on drain."""


@dataclass(frozen=True)
class Output:
    """What left, and the key that was current; without a tag it is of the main stream."""

    key: Key
    tag: str | None
    value: Any


class OperatorHarness:
    """Drives what `make` gives: a function for the start, and another one for each start after a crash.

    The clock may be the function's too. Calls return what left with them; `outputs` is all that has ever left, also
    with calls that raised. A function that has raised takes no more calls: `close`, `crash` or `restore` it.
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
        """An element that has come here by its key; without a key for a function that is not keyed."""
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
        """Rings every event-time timer that is due by then, also one that is set meanwhile."""
        out: list[Output] = []
        self._timers.advance_watermark(to_ms)
        while due := self._timers.take_due(TimeDomain.EVENT_TIME, to_ms):
            out += self._ring(due)
        return out

    def end_input(self) -> list[Output]:
        """A bounded input ends, or the job is drained: the last watermark, and no more timers of processing time."""
        out = self.advance_watermark(END_OF_TIME)
        self._timers.take_due(TimeDomain.PROCESSING_TIME, END_OF_TIME)
        self._ended = True
        return out

    # Time.

    def advance(self, by_ms: float) -> list[Output]:
        """Let time pass; each processing-time timer rings at its time, or at once where that has passed.

        Those of one time ring together; what they set is set before the next ones ring.
        """
        out: list[Output] = []
        until_ms = self.clock.wall_ms() + by_ms
        while (pending := self.timers(TimeDomain.PROCESSING_TIME)) and pending[0].timestamp <= until_ms:
            self.clock.advance(max(0.0, pending[0].timestamp - self.clock.wall_ms()))
            out += self._ring(self._timers.take_due(TimeDomain.PROCESSING_TIME, pending[0].timestamp))
        self.clock.advance(max(0.0, until_ms - self.clock.wall_ms()))
        return out

    def stall(self, by_ms: float) -> list[Output]:
        """Let time pass in which nothing runs; processing-time timers that have become due ring late."""
        self.clock.advance(by_ms)
        return self.advance(0.0)

    def fire(self, timer: Timer) -> list[Output]:
        """Ring one timer, whatever the clock says: Flink counts down a delay, and a wall clock may be set back."""
        self._timers.take(timer)
        return self._ring([timer])

    def timers(self, domain: TimeDomain) -> list[Timer]:
        """All that are set and have not rung, the next one first."""
        return self._timers.pending(domain)

    @property
    def timers_on_their_way(self) -> list[Timer]:
        """What the last element, or the timers that rang together last, have set.

        PyFlink 2.3 registers them some time after the bundle has ended, and a checkpoint does not wait for that.
        """
        return list(self._timers.on_their_way)

    # State and its ends.

    def state(self, name: str, key: int) -> Any:
        """What the state of that name holds under a key: a value, a list or a dictionary."""
        return self._state.read(name, key)

    @property
    def holds_nothing(self) -> bool:
        """Whether no state holds anything under any key."""
        return not self._state.contents

    def snapshot(self) -> Snapshot:
        """A checkpoint, between two calls."""
        assert not self._failed, "there is no checkpoint of what has failed"
        timers = [timer for domain in TimeDomain for timer in self.timers(domain)]
        return Snapshot(dict(self._state.contents), tuple(timers))

    def crash(self) -> None:
        """The worker dies: nobody closes the function, and all that was not in a checkpoint is gone."""
        self._begin(NOTHING)

    def restore(self, snapshot: Snapshot) -> None:
        """Begin anew with what belongs here of a checkpoint, be it of more or of fewer subtasks. Time has gone on."""
        self._begin(snapshot.of_subtask(self.subtask, self.parallelism))

    def close(self) -> None:
        """Flink closes what it has made, also what could not be opened or has failed since."""
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
        """Outputs are told apart as PyFlink does; what the type of their stream cannot hold does not get out."""
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

"""For any sequence of events: no request is lost, and none is answered twice unless there is a crash in between.

A job's inference operator with its subtasks and slots and the topic before it is led through requests, answers, time,
checkpoints, crashes, starts at another parallelism, and drains.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from pyflink.datastream import TimeDomain

from core.clock import ManualClock
from inference_service.config import EngineConfig
from operators.config import BatchingConfig, JobConfig
from operators.envelope import Envelope, WarmUp
from operators.flink.continuous import ContinuousFunction
from operators.flink.micro_batch import MicroBatchFunction
from operators.flink.rows import READY
from operators.flink.slot_function import FAR_TIMER_MS, RECOVERY_TIMER_MS, SlotFunction
from operators.placement import key_of_each_slot
from tests.experiments.experiment_samples import response
from tests.operators.flink.key_groups import subtask_of
from tests.operators.flink.snapshot import NOTHING, Snapshot
from tests.operators.memory_journal import MemoryJournal
from tests.operators.operator_harness import OperatorHarness, Output
from tests.operators.slot_harness import SlotHarness
from tests.operators.stand_in_slot import StandInSlots, envelope, no_waits

MAX_IN_FLIGHT, BATCH_SIZE, MAX_WAIT_MS = 3, 2, 100
RESPONSES = {offset: response(request_id=str(offset)) for offset in range(1, 300, 2)}
"""The responses of every other request. The rest get dead letters."""
parallelisms = st.sampled_from([1, 2, 3])
lost = st.sampled_from(["nothing", "one", "on their way"])
"""Timers that a checkpoint misses."""


@dataclass(frozen=True)
class Checkpoint:
    """What Flink restores: state and timers, the offset in the topic. Also what had happened by then."""

    snapshot: Snapshot
    offset: int
    answered: frozenset[int]
    elements: Counter[int]
    """By key."""


class DeliveryMachine(RuleBasedStateMachine):
    """Requests are identified by their offset in the topic. Each has a session, which has a slot."""

    function: ClassVar[type[SlotFunction]]

    def __init__(self) -> None:
        super().__init__()
        self.opened = ExitStack()
        self.opened.enter_context(no_waits())
        self.now_ms = 1000.0
        self.topic: list[int] = []
        """The session of each request."""
        self.ever_answered: set[int] = set()

    @initialize(parallelism=parallelisms)
    def the_job_is_submitted(self, parallelism: int) -> None:
        self.checkpoint = Checkpoint(NOTHING, 0, frozenset(), Counter())
        self._start(parallelism)
        for slot in range(parallelism):
            self._element(slot, WarmUp(slot))

    @rule(sessions=st.lists(st.integers(0, 5), min_size=1, max_size=5))
    def requests_come(self, sessions: list[int]) -> None:
        for session in sessions:
            self.topic.append(session)
            self._survive(lambda: self._take_in(len(self.topic) - 1))

    @rule(data=st.data())
    def slots_answer(self, data: st.DataObject) -> None:
        running = [(slot, offset) for slot in self.slots.alive for offset in slot.running]
        if running:
            for slot, offset in data.draw(st.lists(st.sampled_from(running), unique=True, min_size=1)):
                slot.let_go(offset)

    @rule(by_ms=st.sampled_from([1, 2, 20]))
    def time_passes(self, by_ms: int) -> None:
        self._survive(lambda: self._advance(by_ms))

    @rule(by_ms=st.sampled_from([MAX_WAIT_MS, RECOVERY_TIMER_MS, 3 * RECOVERY_TIMER_MS]))
    def workers_stall(self, by_ms: int) -> None:
        self.now_ms += by_ms
        self._survive(lambda: self._each(lambda at: at.stall(by_ms)))

    @rule(lost=lost, data=st.data())
    def a_checkpoint_is_taken(self, lost: str, data: st.DataObject) -> None:
        parts = []
        for subtask in self.subtasks:
            timers = subtask.timers(TimeDomain.PROCESSING_TIME)
            if lost == "on their way":
                # The very first timer of a key cannot be protected. The first element is a warm-up, so nothing is lost.
                timers = [timer for timer in subtask.timers_on_their_way if self.elements[timer.key] > 1]
            elif lost == "one" and timers:
                timers = [data.draw(st.sampled_from(timers))]
            else:
                timers = []
            parts.append(subtask.snapshot().without(*timers))
        answered = self.began_with.answered | frozenset(self.answered)
        self.checkpoint = Checkpoint(Snapshot.of_all(parts), len(self.topic), answered, self.elements.copy())

    @rule(parallelism=parallelisms)
    def the_job_crashes(self, parallelism: int) -> None:
        for slot in self.slots.made:
            slot.end()
        self._start(parallelism)
        for offset in range(self.checkpoint.offset, len(self.topic)):
            self._take_in(offset)

    @rule(lost=lost, data=st.data(), parallelism=parallelisms)
    def the_job_crashes_right_after_a_checkpoint(self, lost: str, data: st.DataObject, parallelism: int) -> None:
        self.a_checkpoint_is_taken(lost, data)
        self.the_job_crashes(parallelism)

    @rule(data=st.data())
    def a_slot_dies(self, data: st.DataObject) -> None:
        if self.slots.made:
            data.draw(st.sampled_from(self.slots.made)).fail(RuntimeError("killed"))

    @rule()
    def nothing_more_comes_for_a_while(self) -> None:
        """Nothing hangs: all requests that were taken in are answered."""

        def wait() -> None:
            self.slots.answer_at_once(True)
            self._advance(4 * RECOVERY_TIMER_MS)
            if self.ever_answered != set(range(len(self.topic))):
                self._advance(2 * FAR_TIMER_MS)

        self._survive(wait, again=True)
        self.slots.answer_at_once(False)
        assert self.ever_answered == set(range(len(self.topic)))

    def teardown(self) -> None:
        with self.opened:
            # After a failure there is nothing to be learned from a drain.
            if sys.exc_info()[0] is None:
                self._drain()

    @invariant()
    def no_slot_has_more_than_it_may(self) -> None:
        for slot in self.slots.made:
            assert slot.most_running <= MAX_IN_FLIGHT
            assert all(len(group) <= BATCH_SIZE for group in slot.groups)

    # How.

    def _start(self, parallelism: int) -> None:
        """Start from the last checkpoint."""
        self.began_with = self.checkpoint
        self.answered: Counter[int] = Counter()
        self.elements = self.checkpoint.elements.copy()
        self.slots = StandInSlots(RESPONSES, newest_first=True)
        self.keys = key_of_each_slot(lambda key: subtask_of(key, parallelism), parallelism)
        self.subtasks = [self._subtask(index, parallelism) for index in range(parallelism)]
        for subtask in self.subtasks:
            subtask.restore(self.checkpoint.snapshot)

    def _subtask(self, index: int, parallelism: int) -> OperatorHarness:
        batching = BatchingConfig(max_in_flight=MAX_IN_FLIGHT, batch_size=BATCH_SIZE, max_wait_ms=MAX_WAIT_MS)
        config = JobConfig(parallelism=parallelism, engine=EngineConfig(max_running=2), batching=batching)
        clock, slots = ManualClock(self.now_ms), self.slots
        return SlotHarness(
            lambda: self.function(config, slots.make, lambda: clock, lambda _: MemoryJournal()),
            clock,
            parallelism=parallelism,
            subtask=index,
        )

    def _take_in(self, offset: int) -> None:
        self._element(self.topic[offset] % len(self.subtasks), envelope(offset))

    def _element(self, slot: int, element: Envelope | WarmUp) -> None:
        key = self.keys[slot]
        self.elements[key] += 1
        self._call(self.subtasks[slot], lambda at: at.process(element, key))

    def _advance(self, by_ms: float) -> None:
        self.now_ms += by_ms
        self._each(lambda at: at.advance(by_ms))

    def _drain(self) -> None:
        def drain() -> None:
            self.slots.answer_at_once(True)
            self._each(OperatorHarness.end_input)

        self._survive(drain, again=True)
        assert self.ever_answered == set(range(len(self.topic)))
        assert all(subtask.holds_nothing for subtask in self.subtasks)
        for subtask in self.subtasks:
            subtask.close()
        assert all(slot.closed for slot in self.slots.made)

    def _each(self, what: Callable[[OperatorHarness], list[Output]]) -> None:
        for subtask in self.subtasks:
            self._call(subtask, what)

    def _call(self, subtask: OperatorHarness, what: Callable[[OperatorHarness], list[Output]]) -> None:
        before = len(subtask.outputs)
        try:
            what(subtask)
        finally:
            for output in subtask.outputs[before:]:
                if output.tag != READY.tag_id:
                    self._answered(output)

    def _answered(self, output: Output) -> None:
        offset = int(output.value.key) if output.tag is None else json.loads(output.value.value)["offset"]
        assert offset not in self.began_with.answered, f"{offset} had been answered before the checkpoint"
        self.answered[offset] += 1
        assert self.answered[offset] == 1, f"{offset} is answered twice without a crash"
        self.ever_answered.add(offset)

    def _survive(self, what: Callable[[], None], again: bool = False) -> None:
        """If a function fails with its slot, restart the job as after a crash."""
        while True:
            try:
                return what()
            except RuntimeError:
                if len(self.slots.alive) == len(self.slots.made):
                    raise
                self.the_job_crashes(len(self.subtasks))
                if not again:
                    return None


@pytest.mark.parametrize("function", [ContinuousFunction, MicroBatchFunction])
def test_nothing_is_lost_or_doubled_or_hangs(function: type[SlotFunction]) -> None:
    machine = type(function.__name__, (DeliveryMachine,), {"function": function})
    how = settings(max_examples=100, stateful_step_count=30, deadline=None, report_multiple_bugs=False)
    run_state_machine_as_test(machine, settings=how)

"""A user's error in an operator leaves as one line. It is not raised, because Flink would restart the job."""

import json
from contextlib import closing

import pytest
from pyflink.common import Row

from core.clock import Clock, ManualClock
from core.errors import UserError
from core.kafka_config import KafkaConfig
from operators.config import Batching, BatchingConfig, JobConfig
from operators.envelope import WarmUp
from operators.envelope_state import VERSION
from operators.flink.continuous import ContinuousFunction
from operators.flink.decode import DecodeFunction
from operators.flink.micro_batch import MicroBatchFunction
from operators.flink.rows import READY, USER_ERRORS, WARM_UP
from operators.flink.slot_function import SlotFunction
from operators.metrics.slot_metrics import SlotMetrics
from tests.operators import saved_state
from tests.operators.memory_journal import MemoryJournal
from tests.operators.operator_harness import OperatorHarness, Output
from tests.operators.slot_harness import SlotHarness
from tests.operators.stand_in_slot import StandInSlot, StandInSlots, envelope, no_waits

KEY = 7
CONFIG = JobConfig(parallelism=1)
FUNCTIONS = (ContinuousFunction, MicroBatchFunction)


def refused(config: JobConfig, index: int, clock: Clock, metrics: SlotMetrics) -> StandInSlot:
    raise UserError("model: refused")


def lines(outputs: list[Output]) -> list[str]:
    return [output.value for output in outputs if output.tag == USER_ERRORS.tag_id]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_slot_that_can_not_be_made_is_told_once_and_asked_for_nothing(function: type[SlotFunction]) -> None:
    clock = ManualClock(1000.0)
    harness = SlotHarness(lambda: function(CONFIG, refused, lambda: clock, lambda _: MemoryJournal()), clock)
    with closing(harness):
        assert lines(harness.process(WarmUp(0), KEY)) == ["model: refused"]
        # Further calls in the same bundle: the line has not reached Flink yet.
        assert harness.process(envelope(1), KEY) == []
        assert harness.end_input() == []


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_timer_tells_of_it_after_a_restart(function: type[SlotFunction]) -> None:
    clock = ManualClock(1000.0)
    make = [StandInSlots().make, refused]
    harness = SlotHarness(lambda: function(CONFIG, make.pop(0), lambda: clock, lambda _: MemoryJournal()), clock)
    with closing(harness), no_waits():
        harness.process(envelope(1), KEY)
        snapshot = harness.snapshot()
        harness.close()
        harness.restore(snapshot)
        assert lines(harness.advance(5000)) == ["model: refused"]


def test_what_a_savepoint_holds_of_a_later_release_is_told() -> None:
    slots, clock = StandInSlots(), ManualClock(1000.0)
    config = JobConfig(parallelism=1, batching=BatchingConfig(batching=Batching.MICRO))
    harness = SlotHarness(
        lambda: MicroBatchFunction(config, slots.make, lambda: clock, lambda _: MemoryJournal()), clock
    )
    with closing(harness):
        harness.process(envelope(1), KEY)
        state = harness.snapshot()
        later = saved_state.pickled((VERSION + 1, "unknown"))
        harness.close()
        harness.restore(type(state)({("pending", KEY): (later,)}, state.timers))
        outputs = harness.advance(5000)
        assert [output.tag for output in outputs] == [READY.tag_id, USER_ERRORS.tag_id]
        assert lines(outputs)[0].startswith("savepoint: ")


def test_credentials_that_can_not_be_read_are_told_by_decode_too() -> None:
    def unreadable(_: KafkaConfig) -> MemoryJournal:
        raise UserError("kafka_credentials_file: cannot be read")

    with closing(OperatorHarness(lambda: DecodeFunction(CONFIG, [0], unreadable))) as harness:
        assert lines(harness.process(Row(None, WARM_UP, 0))) == ["kafka_credentials_file: cannot be read"]
        assert harness.process(Row(json.dumps({}).encode(), 0, 0)) == []

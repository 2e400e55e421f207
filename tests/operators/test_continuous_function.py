"""The continuous function without a cluster: its state, its answers, and what a restart submits again."""

import json
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from pyflink.datastream import TimeDomain

from core.clock import ManualClock
from core.records import Response
from inference_service.config import EngineConfig
from operators.config import BatchingConfig, JobConfig
from operators.envelope import Answer, WarmUp
from operators.envelope_state import from_state
from operators.flink.continuous import FULL_POLL_S, POLL_S, ContinuousFunction
from operators.flink.rows import DEAD_LETTERS, READY
from operators.flink.slot_function import END_OF_INPUT
from operators.metrics.slot_metrics import slot_metrics
from operators.slots.pump import Pump
from tests.experiments.experiment_samples import response
from tests.operators.memory_journal import MemoryJournal
from tests.operators.operator_harness import OperatorHarness, Output
from tests.operators.slot_harness import SlotHarness
from tests.operators.stand_in_slot import StandInSlots, envelope, no_waits

KEY = 7
RECOVERY = [2000, 3000, 60_000, 120_000]
"""The recovery timers of a key after its first element, at time 1000."""
CONFIG = JobConfig(parallelism=1, engine=EngineConfig(max_running=2), batching=BatchingConfig(max_in_flight=3))


@pytest.fixture
def slots() -> StandInSlots:
    return StandInSlots()


@pytest.fixture
def harness(slots: StandInSlots) -> Iterator[OperatorHarness]:
    clock = ManualClock(1000.0)
    made = SlotHarness(lambda: ContinuousFunction(CONFIG, slots.make, lambda: clock, lambda _: MemoryJournal()), clock)
    yield made
    made.close()
    assert slots.last.closed


@pytest.fixture(autouse=True)
def waits() -> Iterator[list[float]]:
    """Time-outs of all waits for answers. None of them waits."""
    with no_waits() as found:
        yield found


def offsets(outputs: list[Output]) -> list[int]:
    """Offsets of the dead letters. The outputs may also have the ready record."""
    assert {output.tag for output in outputs} <= {DEAD_LETTERS.tag_id, READY.tag_id}
    return [json.loads(output.value.value)["offset"] for output in outputs if output.tag == DEAD_LETTERS.tag_id]


def process(harness: OperatorHarness, *numbers: int, key: int = KEY) -> list[int]:
    return [offset for number in numbers for offset in offsets(harness.process(envelope(number), key))]


def timers(harness: OperatorHarness, domain: TimeDomain = TimeDomain.PROCESSING_TIME) -> list[Any]:
    return [timer.timestamp for timer in harness.timers(domain)]


def in_flight(harness: OperatorHarness, key: int = KEY) -> list[str]:
    return sorted(harness.state("in-flight", key))


def crash(harness: OperatorHarness, slots: StandInSlots, *, lacking_timers: bool = False) -> None:
    """Crash right after a checkpoint, which may lack the timers that are on their way to Java."""
    lacking = harness.timers_on_their_way if lacking_timers else []
    snapshot = harness.snapshot().without(*lacking)
    slots.last.end()
    harness.crash()
    harness.restore(snapshot)


def test_what_is_in_flight_is_in_state_until_it_is_answered(harness: OperatorHarness, slots: StandInSlots) -> None:
    assert process(harness, 1, 2) == []
    assert in_flight(harness) == ["0-1", "0-2"]
    slots.last.let_go(2)
    assert in_flight(harness) == ["0-1", "0-2"]
    assert offsets(harness.advance(1)) == [2]
    assert in_flight(harness) == ["0-1"]


def test_timers_are_set_as_long_as_something_is_in_flight_and_not_after(
    harness: OperatorHarness, slots: StandInSlots
) -> None:
    process(harness, 1, 2)
    # The timer for the next look, and the recovery timers.
    assert timers(harness) == [1001, *RECOVERY]
    assert timers(harness, TimeDomain.EVENT_TIME) == [END_OF_INPUT]
    harness.advance(1)
    assert timers(harness) == [1002, *RECOVERY]
    slots.last.let_go(1, 2)
    assert offsets(harness.advance(1)) == [1, 2]
    assert timers(harness) == RECOVERY


def test_a_key_that_is_idle_has_recovery_timers_too(harness: OperatorHarness, waits: list[float]) -> None:
    harness.process(WarmUp(0), KEY)
    assert timers(harness) == RECOVERY
    assert harness.advance(5500) == []
    assert timers(harness) == [7000, 8000, *RECOVERY[2:]]
    assert waits == []


def test_looks_do_not_multiply_however_long_something_is_in_flight(harness: OperatorHarness) -> None:
    take = Pump.take

    def take_in_time(pump: Pump, owner: int, timeout_s: float = 0.0) -> list[Answer]:
        harness.clock.advance(timeout_s * 1e3)
        return take(pump, owner, timeout_s)

    with mock.patch.object(Pump, "take", take_in_time):
        process(harness, 1)
        harness.advance(20_000)
    # The timer for the next look, and the recovery timers.
    assert len(timers(harness)) == 1 + len(RECOVERY)


def test_a_timer_waits_only_where_something_of_its_key_is_outstanding(
    harness: OperatorHarness, slots: StandInSlots, waits: list[float]
) -> None:
    process(harness, 1, key=KEY + 1)
    slots.last.let_go(1)
    harness.advance(1)
    process(harness, 2)
    waits.clear()
    for timer in harness.timers(TimeDomain.PROCESSING_TIME) + harness.timers(TimeDomain.EVENT_TIME):
        if timer.key == KEY + 1:
            assert harness.fire(timer) == []
    assert waits == []
    assert harness.advance(1) == []
    assert waits == [POLL_S]


def test_a_timer_waits_for_longer_where_every_row_of_the_engine_is_taken(
    harness: OperatorHarness, waits: list[float]
) -> None:
    process(harness, 1, 2)
    waits.clear()
    assert harness.advance(1) == []
    assert waits == [FULL_POLL_S]


def test_at_the_cap_the_stream_waits_and_lets_out_what_is_done(harness: OperatorHarness, slots: StandInSlots) -> None:
    assert process(harness, 1, 2, 3) == []
    # This wait makes the stand-in answer the oldest request.
    assert process(harness, 4) == [1]
    assert slots.last.sent == [1, 2, 3, 4]
    assert slots.last.most_running == 3


def test_the_end_of_input_answers_all_that_is_in_flight(harness: OperatorHarness, slots: StandInSlots) -> None:
    process(harness, 1, 2, 3)
    slots.last.answer_at_once(True)
    assert sorted(offsets(harness.end_input())) == [1, 2, 3]
    assert harness.holds_nothing


def test_after_a_restart_what_was_in_flight_is_asked_again_before_anything_newer(
    harness: OperatorHarness, slots: StandInSlots
) -> None:
    process(harness, 3, 1, 2)
    crash(harness, slots)
    # Three are in flight at once: the cap holds the newer one back until one of them is done.
    assert process(harness, 9) == [1]
    assert slots.last.sent == [1, 2, 3, 9]
    slots.last.let_go(2, 3, 9)
    assert offsets(harness.advance(1)) == [2, 3, 9]
    assert harness.holds_nothing


def test_a_timer_alone_restores_what_was_in_flight(harness: OperatorHarness, slots: StandInSlots) -> None:
    process(harness, 1)
    crash(harness, slots)
    harness.advance(1)
    slots.last.answer_at_once(True)
    assert offsets(harness.end_input()) == [1]


@pytest.mark.parametrize("idle_ms", [0, 999, 1500, 60_000])
def test_timers_that_a_checkpoint_does_not_hold_strand_nothing(
    harness: OperatorHarness, slots: StandInSlots, idle_ms: int
) -> None:
    harness.process(WarmUp(0), KEY)
    harness.advance(idle_ms)
    process(harness, 1)
    crash(harness, slots, lacking_timers=True)
    harness.advance(2000)
    slots.last.let_go(1)
    assert offsets(harness.advance(1)) == [1]


def test_two_checkpoints_in_a_row_that_lack_timers_strand_nothing(
    harness: OperatorHarness, slots: StandInSlots
) -> None:
    harness.process(WarmUp(0), KEY)
    harness.advance(1000)
    crash(harness, slots, lacking_timers=True)
    process(harness, 1)
    crash(harness, slots, lacking_timers=True)
    harness.advance(2000)
    slots.last.let_go(1)
    assert offsets(harness.advance(1)) == [1]


def test_a_restart_hands_the_slot_no_more_than_it_may_have(harness: OperatorHarness, slots: StandInSlots) -> None:
    """Several keys at one subtask may together have more requests in flight."""
    process(harness, 1, 2, 3)
    slots.last.let_go(1, 2, 3)
    process(harness, 4, 5, key=KEY + 1)
    crash(harness, slots)
    out = offsets(harness.advance(2000))
    assert slots.last.most_running == 3
    assert sorted(slots.last.sent) == [1, 2, 3, 4, 5]
    slots.last.let_go(*slots.last.running)
    assert sorted(out + offsets(harness.advance(2000))) == [1, 2, 3, 4, 5]


def test_keys_that_met_at_one_subtask_keep_their_state_apart(harness: OperatorHarness, slots: StandInSlots) -> None:
    """As after a restart at a lower parallelism: an answer leaves under the key whose state has its request."""
    process(harness, 1)
    process(harness, 2, key=KEY + 1)
    slots.last.let_go(1, 2)
    mine, others = harness.timers(TimeDomain.EVENT_TIME)
    assert (mine.key, others.key) == (KEY, KEY + 1)
    assert offsets(harness.fire(others)) == [2]
    assert (in_flight(harness), in_flight(harness, KEY + 1)) == (["0-1"], [])
    assert offsets(harness.fire(mine)) == [1]
    assert harness.holds_nothing


def test_a_response_leaves_under_its_id_with_the_time_of_leaving(harness: OperatorHarness, slots: StandInSlots) -> None:
    finished = response(request_id="good", created_at_ms=400.0)
    harness.process(envelope(1), KEY)
    slots.last.responses[1] = finished
    slots.last.let_go(1)
    (output,) = harness.end_input()
    assert (output.tag, output.value.key) == (None, "good")
    stamped = finished.model_copy(update={"completed_at_ms": 1000.0, "e2e_ms": 600.0})
    assert Response.model_validate_json(output.value.value) == stamped


def test_a_slot_that_fails_fails_the_job(harness: OperatorHarness, slots: StandInSlots) -> None:
    process(harness, 1)
    slots.last.fail(OSError("device lost"))
    with pytest.raises(RuntimeError, match="device lost"):
        harness.end_input()


def test_a_call_to_warm_up_is_answered_by_the_ready_record(harness: OperatorHarness) -> None:
    (output,) = harness.process(WarmUp(0), KEY)
    assert (output.tag, output.value.key) == (READY.tag_id, "slot-0")
    assert json.loads(output.value.value)["model"] == "m"


def test_attempts_survive_a_restart_of_the_job_and_the_time_it_was_down_does_not_count(
    harness: OperatorHarness, slots: StandInSlots
) -> None:
    process(harness, 1, 2)
    slots.last.ask_again(2)
    slots.last.settle()
    harness.advance(1)
    stored = harness.state("in-flight", KEY)
    assert {ticket: from_state(one).attempts for ticket, one in stored.items()} == {"0-1": 0, "0-2": 1}
    crash(harness, slots)
    process(harness, 3)
    again = slots.last.unanswered
    assert [(one.position.offset, one.attempts, one.decoded_at_ms) for one in again] == [
        (1, 0, 1001.0),
        (2, 1, 1001.0),
        # It may have been on its way to the operator when the job failed.
        (3, 0, 1001.0),
    ]


def test_flink_shows_the_gauges_of_the_slot_and_answers_are_counted(
    harness: OperatorHarness, slots: StandInSlots
) -> None:
    process(harness, 1)
    metrics = slot_metrics(0)
    assert harness.metrics.gauges.keys() == metrics.flink_gauges().keys()
    labels = {"slot": "0", "stage": "inference", "cause": "refused"}
    before = metrics.registry.get_sample_value("infertuner_dead_letters_total", labels) or 0
    slots.last.let_go(1)
    harness.advance(1)
    assert metrics.registry.get_sample_value("infertuner_dead_letters_total", labels) == before + 1

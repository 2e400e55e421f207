"""The micro-batch and the decode function without a cluster: state, timers and outputs."""

import json
from collections.abc import Iterator

import cloudpickle
import pytest
from pyflink.common import Row
from pyflink.datastream import TimeDomain

from core.clock import ManualClock
from core.default_slot import default_slot
from core.records import Response
from operators.config import Batching, BatchingConfig, JobConfig
from operators.envelope import Envelope, RecordPosition, WarmUp
from operators.envelope_state import from_state
from operators.flink.decode import DecodeFunction
from operators.flink.inference import inference_function
from operators.flink.micro_batch import MicroBatchFunction
from operators.flink.rows import DEAD_LETTERS, KEYED, READY, WARM_UP, element_of
from operators.flink.slot_function import END_OF_INPUT
from tests.experiments.experiment_samples import response
from tests.operators.memory_journal import MemoryJournal
from tests.operators.operator_harness import OperatorHarness, Output
from tests.operators.slot_harness import SlotHarness
from tests.operators.stand_in_slot import StandInSlots, envelope

KEY = 7
RECOVERY = [2000, 3000, 60_000, 120_000]
CONFIG = JobConfig(parallelism=1, batching=BatchingConfig(batch_size=3, max_wait_ms=100))


@pytest.fixture
def slots() -> StandInSlots:
    return StandInSlots()


@pytest.fixture
def harness(slots: StandInSlots) -> Iterator[OperatorHarness]:
    clock = ManualClock(1000.0)
    made = SlotHarness(lambda: MicroBatchFunction(CONFIG, slots.make, lambda: clock, lambda _: MemoryJournal()), clock)
    yield made
    made.close()
    assert slots.last.closed


def offsets(outputs: list[Output]) -> list[int]:
    """Offsets of the dead letters. The outputs may also have the ready record."""
    assert {output.tag for output in outputs} <= {DEAD_LETTERS.tag_id, READY.tag_id}
    return [json.loads(output.value.value)["offset"] for output in outputs if output.tag == DEAD_LETTERS.tag_id]


def process(harness: OperatorHarness, *numbers: int, key: int = KEY) -> list[int]:
    return [offset for number in numbers for offset in offsets(harness.process(envelope(number), key))]


def timers(harness: OperatorHarness, domain: TimeDomain = TimeDomain.PROCESSING_TIME) -> list[int]:
    return [timer.timestamp for timer in harness.timers(domain)]


def test_a_full_batch_leaves_at_once_and_takes_its_state_along(harness: OperatorHarness) -> None:
    assert [process(harness, number) for number in range(4)] == [[], [], [0, 1, 2], []]
    assert [from_state(one).position.offset for one in harness.state("pending", KEY)] == [3]


def test_a_timer_closes_the_batch_that_it_was_set_for_and_no_other(harness: OperatorHarness) -> None:
    process(harness, 0)
    assert timers(harness) == [1101, *RECOVERY]
    harness.advance(90)
    process(harness, 1, 2, 3)
    assert timers(harness) == [1101, 1191, *RECOVERY]
    assert offsets(harness.advance(11)) == []
    assert offsets(harness.advance(90)) == [3]


def test_a_clock_that_is_set_back_strands_nothing(harness: OperatorHarness) -> None:
    process(harness, 0)
    first = harness.timers(TimeDomain.PROCESSING_TIME)[0]
    harness.clock.advance(-500)
    assert offsets(harness.fire(first)) == [0]


def test_the_end_of_input_flushes_what_has_not_waited_long_enough(harness: OperatorHarness) -> None:
    process(harness, 0)
    assert timers(harness, TimeDomain.EVENT_TIME) == [END_OF_INPUT]
    assert offsets(harness.end_input()) == [0]


@pytest.mark.parametrize("waiting", [1, 2])
def test_what_waited_before_a_restart_comes_first_and_once(harness: OperatorHarness, waiting: int) -> None:
    process(harness, *range(waiting))
    harness.restore(harness.snapshot())
    out = process(harness, 8, 9)
    out += offsets(harness.end_input())
    assert out == [*range(waiting), 8, 9]
    assert harness.holds_nothing


def test_a_timer_alone_restores_what_waited(harness: OperatorHarness) -> None:
    process(harness, 0)
    harness.restore(harness.snapshot())
    assert offsets(harness.end_input()) == [0]


@pytest.mark.parametrize("idle_ms", [0, 999, 1500, 60_000])
def test_timers_that_a_checkpoint_does_not_hold_strand_nothing(harness: OperatorHarness, idle_ms: int) -> None:
    harness.process(WarmUp(0), KEY)
    harness.advance(idle_ms)
    process(harness, 0)
    harness.restore(harness.snapshot().without(*harness.timers_on_their_way))
    assert offsets(harness.advance(2200)) == [0]


def test_keys_that_met_at_one_subtask_batch_by_themselves(harness: OperatorHarness, slots: StandInSlots) -> None:
    """As after a restart at another parallelism: a batch leaves under the key whose state has its requests."""
    process(harness, 0, 1)
    process(harness, 2, 3, key=KEY + 1)
    assert process(harness, 4) == [0, 1, 4]
    assert (harness.state("pending", KEY), len(harness.state("pending", KEY + 1))) == ([], 2)
    assert offsets(harness.advance(200)) == [2, 3]
    assert slots.last.groups == [[0, 1, 4], [2, 3]]
    assert harness.holds_nothing


def test_responses_leave_as_the_slot_stamped_them_and_not_to_the_side(
    harness: OperatorHarness, slots: StandInSlots
) -> None:
    harness.process(envelope(1), KEY)
    slots.last.responses[1] = response(request_id="good")
    (output,) = harness.end_input()
    assert (output.tag, output.value.key) == (None, "good")
    assert Response.model_validate_json(output.value.value) == response(request_id="good")


def test_a_call_to_warm_up_is_answered_by_the_ready_record(harness: OperatorHarness) -> None:
    (output,) = harness.process(WarmUp(0), KEY)
    assert output.tag == READY.tag_id
    assert json.loads(output.value.value)["model"] == "m"


def test_a_record_becomes_an_envelope_or_a_dead_letter_or_a_call_to_warm_up() -> None:
    keys = (11, 12, 13)
    config = CONFIG.model_copy(update={"parallelism": len(keys)})
    harness = OperatorHarness(lambda: DecodeFunction(config, keys, lambda _: MemoryJournal()), output_type=KEYED)
    request = {"request_id": "r", "session_id": "s", "user_id": "u", "created_at_ms": 1, "max_new_tokens": 1}
    raw = json.dumps(request | {"prompt": "p"}).encode()
    (good,) = harness.process(Row(raw, 2, 5))
    sent = element_of(good.value.element)
    assert isinstance(sent, Envelope)
    assert (good.tag, sent.slot, sent.raw) == (None, default_slot("s", len(keys)), raw)
    assert sent.position == RecordPosition(CONFIG.kafka.requests_topic, 2, 5)
    assert good.value.key == keys[sent.slot]
    for bad in (b"no request", None):
        (letter,) = harness.process(Row(bad, 2, 6))
        assert letter.tag == DEAD_LETTERS.tag_id
        assert (json.loads(letter.value.value)["partition"], json.loads(letter.value.value)["offset"]) == (2, 6)
    for slot, key in enumerate(keys):
        (call,) = harness.process(Row(None, WARM_UP, slot))
        assert (call.tag, call.value.key, element_of(call.value.element)) == (None, key, WarmUp(slot))
    harness.close()


@pytest.mark.parametrize("batching", Batching)
def test_a_function_can_be_sent_to_a_worker(batching: Batching) -> None:
    function = inference_function(JobConfig(batching=BatchingConfig(batching=batching)))
    assert type(cloudpickle.loads(cloudpickle.dumps(function))) is type(function)

"""A restarted slot and requests that were answered before: those in its state, and those that come again."""

import json
from collections.abc import Iterator

import pytest

from core.clock import ManualClock
from core.records import DeadLetter
from operators.config import BatchingConfig, JobConfig
from operators.envelope import Envelope, RecordPosition, WarmUp
from operators.flink.continuous import ContinuousFunction
from operators.flink.micro_batch import MicroBatchFunction
from operators.flink.rows import DEAD_LETTERS, READY
from operators.flink.slot_function import SlotFunction
from tests.experiments.experiment_samples import response
from tests.operators.memory_journal import MemoryJournal, Transaction, TransactionState
from tests.operators.operator_harness import Output
from tests.operators.slot_harness import SlotHarness
from tests.operators.stand_in_slot import StandInSlots, no_waits

KEY = 7
CONFIG = JobConfig(parallelism=1, batching=BatchingConfig(batch_size=4))
KAFKA = CONFIG.kafka


class Job:
    """The operator of one slot, the topics around it, and its outputs."""

    def __init__(self, function: type[SlotFunction]) -> None:
        clock = ManualClock(1000.0)
        self.slots = StandInSlots({number: response(request_id=f"r{number}") for number in range(10)})
        self.journal = MemoryJournal()
        self.harness = SlotHarness(
            lambda: function(CONFIG, self.slots.make, lambda: clock, lambda _: self.journal), clock
        )

    def send(self, number: int) -> Envelope:
        """Add a request to the topic, and return it as the slot will see it."""
        fields = {"session_id": "s", "user_id": "u", "max_new_tokens": 1, "created_at_ms": 0.0, "prompt": "p"}
        raw = json.dumps(fields | {"request_id": f"r{number}"}).encode()
        offset = self.journal.append(KAFKA.requests_topic, 0, None, raw)
        assert offset == number
        return Envelope(0, raw, RecordPosition(KAFKA.requests_topic, 0, offset), 0.0)

    def restart(self) -> None:
        """Restart from a checkpoint of this moment."""
        snapshot = self.harness.snapshot()
        self.slots.last.end()
        self.harness.crash()
        self.slots.answer_at_once(True)
        self.harness.restore(snapshot)

    def wake(self) -> list[Output]:
        """Let time pass until all requests that reach the slot are answered."""
        return self.harness.advance(5000)

    @property
    def asked(self) -> list[int]:
        """Offsets of the requests that the latest slot received."""
        slot = self.slots.last
        return sorted([*slot.sent, *(offset for group in slot.groups for offset in group)])


@pytest.fixture(params=[ContinuousFunction, MicroBatchFunction])
def job(request: pytest.FixtureRequest) -> Iterator[Job]:
    with no_waits():
        made = Job(request.param)
        yield made
        made.harness.close()


def answers(outputs: list[Output]) -> list[tuple[str | None, str]]:
    """Tag and key of all outputs except ready records."""
    return sorted((output.tag, output.value.key) for output in outputs if output.tag != READY.tag_id)


def test_what_was_in_flight_and_is_answered_leaves_the_state_and_is_not_asked(job: Job) -> None:
    for number in (0, 1, 2):
        assert answers(job.harness.process(job.send(number), KEY)) == []
    job.restart()
    job.journal.append(KAFKA.responses_topic, 0, "r1", b"answer")
    assert answers(job.wake()) == [(None, "r0"), (None, "r2")]
    assert job.asked == [0, 2]
    assert job.harness.holds_nothing


def test_what_comes_again_and_is_answered_is_not_asked(job: Job) -> None:
    envelopes = [job.send(number) for number in (0, 1)]
    job.harness.process(WarmUp(0), KEY)
    job.restart()
    job.journal.append(KAFKA.responses_topic, 0, "r0", b"answer")
    outputs = [output for envelope in envelopes for output in job.harness.process(envelope, KEY)]
    assert answers([*outputs, *job.wake()]) == [(None, "r1")]
    assert job.asked == [1]


def test_an_answer_that_a_failure_took_back_leaves_as_it_was(job: Job) -> None:
    job.harness.process(job.send(0), KEY)
    job.restart()
    again = job.send(1)
    letter = DeadLetter.of(b"", "why", stage="inference", request_id="r1", topic="t", partition=0, offset=1).to_json()
    aborted = Transaction()
    job.journal.append(KAFKA.responses_topic, 0, "r0", '{"ä": 1}'.encode(), aborted)
    job.journal.append(KAFKA.dead_letters_topic, 0, "r1", letter.encode(), aborted)
    aborted.outcome = TransactionState.ABORTED
    outputs = [*job.harness.process(again, KEY), *job.wake()]
    left = sorted((output.tag or "", tuple(output.value)) for output in outputs if output.tag != READY.tag_id)
    assert left == [("", ("r0", '{"ä": 1}')), (DEAD_LETTERS.tag_id, ("r1", letter))]
    assert job.asked == []


def test_what_comes_while_the_slot_runs_is_asked_without_a_look(job: Job) -> None:
    job.harness.process(WarmUp(0), KEY)
    job.slots.answer_at_once(True)
    outputs = job.harness.process(job.send(0), KEY)
    assert answers([*outputs, *job.wake()]) == [(None, "r0")]
    assert job.journal.reads == []


def test_an_idle_slot_is_opened_after_a_restart_and_says_so_once(job: Job) -> None:
    ready = job.harness.process(WarmUp(0), KEY)
    assert [output.tag for output in ready] == [READY.tag_id]
    job.restart()
    assert len(job.slots.made) == 1
    outputs = job.wake()
    assert len(job.slots.made) == 2
    outputs += job.harness.process(job.send(0), KEY)
    assert [output.tag for output in outputs].count(READY.tag_id) == 1

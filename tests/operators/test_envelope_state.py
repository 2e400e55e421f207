"""State outlives the release that wrote it: requests that any release stored are read and submitted again."""

import pickle
import pickletools
from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import UserError
from operators.envelope_state import VERSION, from_state, to_state
from operators.flink.continuous import ContinuousFunction
from operators.flink.micro_batch import MicroBatchFunction
from operators.flink.slot_function import SlotFunction
from tests.operators import saved_state
from tests.operators.stand_in_slot import envelope, no_waits
from tests.operators.test_recovery import Job, answers

STATES = Path(__file__).parent / "states"
"""States by operator and release, with requests 0, 1 and 2 of `Job.send` in flight. In the continuous ones a process
died with request 1."""
OPERATORS = {"continuous": ContinuousFunction, "micro_batch": MicroBatchFunction}
RELEASES = ["0.1.0", "1"]
"""Release 0.1.0 stored instances. Later releases store tuples with a version number."""


@pytest.mark.parametrize("created_at_ms", [None, 5.5])
def test_what_is_stored_comes_back_whole(created_at_ms: float | None) -> None:
    stored = replace(envelope(3), slot=2, decoded_at_ms=7.5, attempts=1, created_at_ms=created_at_ms)
    assert from_state(to_state(stored)) == stored


def test_no_class_is_stored() -> None:
    opcodes = {opcode.name for opcode, _, _ in pickletools.genops(to_state(envelope(3)))}
    assert opcodes.isdisjoint({"GLOBAL", "STACK_GLOBAL"})


def test_state_of_a_later_release_is_told() -> None:
    with pytest.raises(UserError, match=rf"^savepoint: .* version {VERSION + 1}, .* up to {VERSION}; start"):
        from_state(pickle.dumps((VERSION + 1, "anything")))


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(("name", "function"), OPERATORS.items())
def test_state_of_each_release_is_resumed(name: str, function: type[SlotFunction], release: str) -> None:
    with no_waits():
        job = Job(function)
        sent = [job.send(number) for number in range(3)]
        job.slots.answer_at_once(True)
        job.harness.restore(saved_state.read(STATES / f"{name}_{release}.json"))
        assert answers(job.wake()) == [(None, "r0"), (None, "r1"), (None, "r2")]
        assert job.asked == [0, 1, 2]
        assert job.harness.holds_nothing
        attempts = [one.attempts for one in job.slots.last.taken]
        assert attempts == ([0, 1, 0] if name == "continuous" else [0, 0, 0])
        assert [(one.raw, one.position) for one in job.slots.last.taken] == [(one.raw, one.position) for one in sent]
        job.harness.close()

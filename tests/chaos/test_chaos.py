"""A short form of scripts/run_chaos.sh: one job under hostile input and two cheap faults loses nothing."""

from pathlib import Path

import pytest

from local_stack import LocalStack
from tests.chaos.__main__ import tiny_job
from tests.chaos.faults import Paused, PythonKilled
from tests.chaos.hostile import mixed_records, under_hostile_input
from tests.chaos.load import LoadShape, Reference
from tests.chaos.scenario import drained, running_job, under_fire
from tests.chaos.stack import WORKER, ChaosStack
from tests.chaos.table import failings, hostile_failings, hostile_row, row

pytestmark = pytest.mark.integration
SHAPE = LoadShape(requests=40, rate_per_s=5.0, seed=3, patience_s=60.0, max_new_tokens=40, system_tokens=16, turns=2)


def test_a_job_under_fire_loses_nothing_and_answers_rightly(stack: LocalStack, tmp_path: Path) -> None:
    harmed, job = ChaosStack(stack), tiny_job(tmp_path / "tiny", checkpoint_interval_ms=1000)
    reference = Reference(job)
    paused = Paused(harmed, lambda: harmed.started("redis").pid, hold_s=1.5)
    with running_job("short", harmed, job) as run:
        verdicts = under_hostile_input(run, mixed_records(seed=1, count=300), 60.0, lambda what, count: None)
        assert hostile_failings(verdicts, hostile_row(run, verdicts, reference, seed=1)) == []

        trial = under_fire("redis-paused", run, paused, SHAPE, lambda what, count: None)
        assert failings(trial, row(trial, reference)) == []

        killed = PythonKilled(harmed, WORKER)
        trial = drained(run, under_fire("worker-killed", run, killed, SHAPE, lambda what, count: None))
        result = row(trial, reference)
        assert failings(trial, result) == []
        assert (result["answered"], result["lost"], result["wrong"]) == (SHAPE.requests, 0, 0)

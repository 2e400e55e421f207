"""A job that computes its answers by arithmetic, instead of a job on Flink, to test a benchmark's figures."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.on_flink import PARTS, PASS_THROUGH, PIPELINE, Drained, LoadResult, OperatorTimes, ReceivedResponse
from core.records import FinishReason, Response
from experiments.records import ReadySlot
from operators.config import JobConfig
from workloads.kafka_generator import LoadReport
from workloads.pacing import Lag
from workloads.timed_request import Workload


def made_answer(
    created_ms: float, received_ms: float, tokens: int = 4, request_id: str = "r", user: str = "u"
) -> ReceivedResponse:
    response = Response(
        request_id=request_id, session_id="s", user_id=user, text="", token_ids=tuple(range(tokens)),
        finish_reason=FinishReason.LENGTH, slot=0, device="cpu", engine="e", model="m", batch_id="b", batch_size=1,
        prompt_tokens=1, local_tokens=0, remote_tokens=0, computed_tokens=1, output_tokens=tokens,
        created_at_ms=created_ms, completed_at_ms=received_ms - 1, wait_ms=0.0, ttft_ms=1.0, tpot_ms=1.0,
        inference_ms=1.0, e2e_ms=1.0, cache_capacity_chunks=0, cache_used_chunks=0, chunk_bytes=0,
    )  # fmt: skip
    return ReceivedResponse(response, received_ms)


def made_load_result(*answers: ReceivedResponse) -> LoadResult:
    count = len(answers)
    return LoadResult(answers, LoadReport(count, count, 0, None, 1.0, None, None, Lag()))


class MadeJob:
    """Answers each request `pace_ms` after the one before it; the first of a backlog `pace_ms` after the beginning."""

    def __init__(self, name: str, job: JobConfig, pace_ms: float = 10.0) -> None:
        self._pace_ms = pace_ms
        self.name = name
        self.slots = tuple(
            ReadySlot(slot=slot, device="cpu", model="made", engine="made") for slot in range(job.parallelism)
        )
        self._answered = 0
        self._seen: set[str] = set()

    def offer(self, workload: Workload, *, backlog: bool) -> LoadResult:
        answers = []
        for index, timed in enumerate(workload):
            assert timed.request_id not in self._seen
            self._seen.add(timed.request_id)
            at_ms = 0.0 if backlog else timed.at_ms
            received_ms = self._pace_ms * (index + 1) if backlog else at_ms + self._pace_ms
            answers.append(made_answer(at_ms, received_ms, timed.max_new_tokens, timed.request_id, timed.user_id))
        self._answered += len(answers)
        return made_load_result(*answers)

    def drain(self, workload: Workload) -> Drained:
        outcome = self.offer(workload, backlog=True)
        values = tuple(answer.response.to_json().encode() for answer in outcome.answers)
        return Drained(self._pace_ms * len(values) / 1000, values)

    def operators(self, records: int) -> dict[str, OperatorTimes]:
        assert records == self._answered
        return {"decode": OperatorTimes(1, 4.0 * records, 0.0), "inference": OperatorTimes(1, 8.0 * records, 0.0)}


@contextmanager
def made_cluster(*_: Any, **__: Any) -> Iterator[SimpleNamespace]:
    yield SimpleNamespace(brokers="made:9092", redis_url=None)


@contextmanager
def made_running(
    _flink: object, _found: object, name: str, job: JobConfig, script: Path = PIPELINE
) -> Iterator[MadeJob]:
    """The pass-through job is twice as fast."""
    yield MadeJob(name, job, pace_ms=5.0 if script == PASS_THROUGH else 10.0)


class MadeCpuSeconds:
    def __init__(self, *_: Any) -> None:
        self._read = 0

    def by_part(self) -> dict[str, float]:
        self._read += 1
        return dict.fromkeys(PARTS, float(self._read))

    def total_s(self) -> float:
        return 0.0

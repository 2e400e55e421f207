"""Made records for the tests of experiments: nothing of them was measured."""

import random
from typing import Any

from core.config import JobConfig, Strategy
from core.records import DeadLetter, Response
from experiments.config import in_own_space, with_strategy
from experiments.records import Load, Manifest, Provenance, ReadySlot, RunRecords, Sent
from workloads.config import WorkloadConfig, WorkloadKind

BEGIN_MS = 1_800_000_000_000.0


def response(**fields: Any) -> Response:
    """A response that took 100 ms for 10 computed tokens, but for the given `fields`."""
    values: dict[str, Any] = {
        "request_id": "r0",
        "session_id": "s",
        "user_id": "u",
        "text": "x",
        "token_ids": (1,) * fields.get("output_tokens", 2),
        "finish_reason": "length",
        "slot": 0,
        "device": "cpu",
        "engine": "transformers 5.0",
        "model": "random-qwen2-30m",
        "batch_id": "b0",
        "batch_size": 1,
        "local_tokens": 0,
        "remote_tokens": 0,
        "computed_tokens": 10,
        "output_tokens": 2,
        "created_at_ms": BEGIN_MS,
        "wait_ms": 20.0,
        "ttft_ms": 60.0,
        "tpot_ms": 40.0,
        "inference_ms": 80.0,
        "e2e_ms": 100.0,
        "cache_capacity_chunks": 96,
        "cache_used_chunks": 10,
        "chunk_bytes": 1000,
    } | fields
    values.setdefault("prompt_tokens", values["local_tokens"] + values["remote_tokens"] + values["computed_tokens"])
    values.setdefault("completed_at_ms", values["created_at_ms"] + values["e2e_ms"])
    return Response(**values)


def manifest(**fields: Any) -> Manifest:
    values: dict[str, Any] = {
        "experiment": "cache_experiments",
        "run_id": "20260101-120000",
        "variant": "STATIC",
        "position": 0,
        "job": JobConfig(),
        "workload": WorkloadConfig(requests=200),
        "job_id": "0" * 32,
        "slots": (ReadySlot(slot=0, device="cpu", model="random-qwen2-30m", engine="transformers 5.0", pid=7),),
        "load": Load(
            sent=200, acknowledged=200, errors=0, first_error=None, duration_ms=66_000.0, offered_rate=3.03,
            reached_rate=3.02, lag_mean_ms=0.4, lag_max_ms=3.0, lag_late=0, adjustments={"restarted_sessions": 3},
        ),
        "duplicates": 0,
        "late_duplicates": 0,
        "failures": (),
        "provenance": Provenance(
            started_at="2026-01-01T12:00:00+00:00", machine={"cores": 2}, versions={"python": "3.11"},
            git_commit="abc", git_dirty=False,
        ),
    } | fields  # fmt: skip
    return Manifest(**values)


def dead_letter(**fields: Any) -> DeadLetter:
    values: dict[str, Any] = {"reason": "too long", "stage": "decode", "topic": "t", "partition": 0, "offset": 3}
    return DeadLetter.of(b"{}", **(values | fields))


def run_of(*responses: Response, dead_letters: tuple[DeadLetter, ...] = (), **fields: Any) -> RunRecords:
    sent = tuple(
        Sent(request_id=made.request_id, session_id=made.session_id, created_at_ms=made.created_at_ms)
        for made in responses
    )
    return RunRecords(manifest(**fields), sent, responses, dead_letters)


def made_run(strategy: Strategy, position: int, requests: int = 200, seed: int = 1) -> RunRecords:
    """A run that looks like one of the phases workload on two slots."""
    dice = random.Random(f"{seed}/{strategy}")
    capacity = {0: 96.0, 1: 96.0}
    responses = []
    for index in range(requests):
        busy = 0.35 < index / requests < 0.75
        slot = index % 2
        if strategy is Strategy.FLUID and index % 30 == slot:
            capacity[slot] = max(32, min(384, capacity[slot] * (1.25 if busy else 1 / 1.15)))
        if strategy is Strategy.FREQUENCY and index % 30 == slot:
            capacity[slot] = max(32, min(384, dice.uniform(0.8, 1.2) * (240 if busy else 120)))
        prompt = dice.randint(10, 30) * 32
        local = prompt * dice.uniform(0.1, 0.5 if busy else 0.8) * min(1, capacity[slot] / 150) // 32 * 32
        remote = (prompt - local) * dice.uniform(0, 0.6) // 32 * 32
        inference = 200 + (prompt - local - remote) * 1.1 + dice.expovariate(1 / 80)
        wait = dice.expovariate(1 / (220 if busy else 60))
        responses.append(
            response(
                request_id=f"phases-0-{index:06d}", session_id=f"s{index % 9}", slot=slot, batch_id=f"b{index // 2}",
                batch_size=2, local_tokens=int(local), remote_tokens=int(remote),
                computed_tokens=int(prompt - local - remote), output_tokens=16,
                created_at_ms=BEGIN_MS + 400 * index - 133 * max(0, index - 11 * requests // 20),
                wait_ms=wait, ttft_ms=wait + inference / 2, tpot_ms=12.0, inference_ms=inference,
                e2e_ms=wait + inference, cache_capacity_chunks=int(capacity[slot]),
                cache_used_chunks=int(min(capacity[slot], index * 2.5 + 8)), chunk_bytes=196_608,
            )
        )  # fmt: skip
    job = in_own_space(with_strategy(JobConfig(), strategy), f"cache-20260101-120000-{strategy.lower()}")
    workload = WorkloadConfig(workload=WorkloadKind.PHASES, requests=requests)
    return run_of(*responses, variant=strategy, position=position, job=job, workload=workload)


def made_runs(requests: int = 200) -> list[RunRecords]:
    return [made_run(strategy, position, requests) for position, strategy in enumerate(Strategy)]

"""Records for tests of experiments. Nothing in them was measured."""

import random
from pathlib import Path
from typing import Any

from cache.config import CacheConfig
from cache.registry import SIZING
from core.records import DeadLetter, Response
from experiments.cache_experiments import with_strategy
from experiments.config import in_own_space
from experiments.records import LoadSummary, Manifest, Provenance, ReadySlot, RunRecords, Sent
from inference_service.config import EngineConfig
from operators.config import Batching, BatchingConfig, JobConfig
from workloads.config import WorkloadConfig

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
        "load": LoadSummary(
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


def made_run(strategy: str, position: int, requests: int = 200, seed: int = 1) -> RunRecords:
    """A run like one of the phases workload on two slots."""
    dice = random.Random(f"{seed}/{strategy}")
    capacity = {0: 96.0, 1: 96.0}
    responses = []
    for index in range(requests):
        busy = 0.35 < index / requests < 0.75
        slot = index % 2
        if strategy == "FLUID" and index % 30 == slot:
            capacity[slot] = max(32, min(384, capacity[slot] * (1.25 if busy else 1 / 1.15)))
        if strategy == "MRC" and index % 30 == slot:
            capacity[slot] = 200 if busy else 80
        if strategy == "FREQUENCY" and index % 30 == slot:
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
    workload = WorkloadConfig(workload="phases", requests=requests)
    return run_of(*responses, variant=strategy, position=position, job=job, workload=workload)


def made_runs(requests: int = 200) -> list[RunRecords]:
    return [made_run(strategy, position, requests) for position, strategy in enumerate(SIZING)]


def made_batch_run(size: int | None, position: int, gap_ms: float, requests: int = 60) -> RunRecords:
    """A run of micro-batches of `size`, or of continuous batching, each answer `gap_ms` after the one before."""
    dice = random.Random(f"batches/{size}")
    together = size or 5
    responses = []
    for index in range(requests):
        created_ms = BEGIN_MS + 330 * index
        inference = 250 + 20 * together + dice.expovariate(1 / 150)
        leaves_ms = max(created_ms + inference + 30, BEGIN_MS + 600 + gap_ms * index)
        leaving = 0.0 if together == 1 or size is None else 0.1 * inference
        wait = max(0.0, leaves_ms - created_ms - inference - leaving - 10)
        responses.append(
            response(
                request_id=f"independent-0-{index:06d}", session_id=f"s{index}", output_tokens=21,
                batch_id=f"b{index if size is None else index // size}", batch_size=together, decode_rows=together,
                created_at_ms=created_ms, wait_ms=wait, ttft_ms=10 + wait + inference - 200, tpot_ms=10.0,
                inference_ms=inference, e2e_ms=leaves_ms - created_ms,
            )
        )  # fmt: skip
    how = {"batching": Batching.CONTINUOUS} if size is None else {"batching": Batching.MICRO, "batch_size": size}
    job = JobConfig(parallelism=1, batching=BatchingConfig(**how))
    return run_of(
        *responses,
        experiment="batch_analysis",
        variant="continuous" if size is None else f"batch_{size}",
        position=position,
        job=job,
        workload=WorkloadConfig(workload="independent", requests=requests),
    )


def made_batch_runs() -> list[RunRecords]:
    """Batch 1 is overloaded; the others keep up with the 3.03 requests/s."""
    gaps_ms = {1: 600.0, 2: 380.0, 4: 330.0, 8: 330.0, None: 330.0}
    return [made_batch_run(size, position, gap_ms) for position, (size, gap_ms) in enumerate(gaps_ms.items())]


def made_scaling_run(slots: int, position: int, device: str = "cpu", requests: int = 48) -> RunRecords:
    """A backlog that the slots share evenly; each answers one request in 500 ms, and loses 5 % for each other slot.

    `device` may hold `{slot}`.
    """
    took_ms = 500.0 * (1 + 0.05 * (slots - 1))
    responses = []
    for index in range(requests):
        slot, turn = index % slots, index // slots
        responses.append(
            response(
                request_id=f"independent-0-{index:06d}", slot=slot, device=device.format(slot=slot),
                batch_id=f"b{index}", created_at_ms=BEGIN_MS, wait_ms=took_ms * turn,
                ttft_ms=took_ms * (turn + 0.2), tpot_ms=took_ms * 0.8, inference_ms=took_ms,
                e2e_ms=took_ms * (turn + 1),
            )
        )  # fmt: skip
    ready = tuple(
        ReadySlot(slot=slot, device=device.format(slot=slot), model="m", engine="e", threads=1) for slot in range(slots)
    )
    engine = EngineConfig()
    if device.startswith("simulated"):
        engine = EngineConfig(engine="simulated", profile=Path("profile.json"))
    made = manifest()
    return run_of(
        *responses,
        experiment="gpu_scaling",
        variant=f"parallelism_{slots}",
        position=position,
        job=JobConfig(parallelism=slots, engine=engine, cache=CacheConfig(cache=False)),
        workload=WorkloadConfig(workload="independent", requests=max(1, requests)),
        slots=ready,
        load=made.load.model_copy(update={"offered_rate": None, "sent": requests}),
    )


def made_scaling_runs(device: str = "cpu") -> list[RunRecords]:
    return [made_scaling_run(slots, position, device) for position, slots in enumerate((1, 2, 4))]

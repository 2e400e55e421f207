"""Runs one scenario: job, load, a fault in the middle of it, and all outcomes."""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.on_flink import PIPELINE, FlinkConfig, running
from core.clock import SystemClock
from core.errors import UserError
from core.options import flatten, from_options
from experiments.collector import Collector
from experiments.services import Services
from operators.config import JobConfig
from tests.chaos.begins import BeginLog
from tests.chaos.faults import (
    Burst,
    DiskFull,
    EngineHung,
    Fault,
    PartKilled,
    Paused,
    PythonKilled,
    RedisFlipped,
    RedisFull,
    RedisSlow,
    Rescaled,
)
from tests.chaos.load import Book, LoadShape, SteadyLoad, patient_producer
from tests.chaos.stack import SLOT, WORKER, ChaosStack, RunningJob
from workloads.kafka_generator import KafkaLoadGenerator, offered

POLL_MS = 50
STRIKE_AFTER = 0.25
"""The fault is injected when this share of the requests has been answered."""
DRAIN_TIMEOUT_S = 90.0


OnProgress = Callable[[str, int], None]
"""Called with the current activity and the number of requests that have an outcome."""


SCENARIOS: Mapping[str, Callable[[ChaosStack], Fault]] = {
    "none": Fault,
    "worker-killed": lambda stack: PythonKilled(stack, WORKER),
    "slot-killed": lambda stack: PythonKilled(stack, SLOT),
    "taskmanager-killed": lambda stack: PartKilled(stack, "taskmanager-1", hold_s=2.0),
    "jobmanager-killed": lambda stack: PartKilled(stack, "jobmanager", hold_s=2.0),
    "kafka-killed": lambda stack: PartKilled(stack, "kafka", hold_s=2.0),
    "redis-killed": lambda stack: PartKilled(stack, "redis", hold_s=4.0),
    "redis-paused": lambda stack: Paused(stack, lambda: stack.started("redis").pid, hold_s=5.0),
    "redis-slow": RedisSlow,
    "redis-full": RedisFull,
    "redis-flipped": RedisFlipped,
    "disk-full": DiskFull,
    "burst": Burst,
    "engine-hung": EngineHung,
    "rescaled": lambda stack: Rescaled(stack, PIPELINE, parallelism=1),
    "exactly-once": lambda stack: PythonKilled(stack, WORKER, {"delivery": "exactly-once"}),
}


@dataclass(frozen=True)
class Trial:
    """The record of one scenario, from which its row and its panel are made."""

    scenario: str
    job: JobConfig
    """Parallelism at the end."""
    shape: LoadShape
    book: Book
    copies: int
    """Requests that were sent twice."""
    unacknowledged: int
    """Number of records that Kafka did not take."""
    fault_ms: float
    healed_ms: float
    begins: BeginLog
    restarts: int
    evidence: str
    problems: tuple[str, ...]
    """Problems in running the scenario."""

    @property
    def begun(self) -> list[str]:
        """Ids of its requests, each as often as an engine has begun it so far."""
        return [name for name in self.begins.request_ids() if name.startswith(f"{self.scenario}/")]


class Strike:
    """Injects the fault while the load runs, and heals it later."""

    def __init__(self, fault: Fault, run: RunningJob, pool: ThreadPoolExecutor) -> None:
        self._fault = fault
        self._run = run
        self._pool = pool
        self._future: Future[None] | None = None
        self.fault_ms = self.healed_ms = 0.0

    @property
    def begun(self) -> bool:
        return self._future is not None

    @property
    def over(self) -> bool:
        """Wait for the end; raise the error of the fault, if there was one."""
        if self._future is None or not self._future.done():
            return False
        self._future.result()
        return True

    def begin(self) -> None:
        self._future = self._pool.submit(self._strike)

    def _strike(self) -> None:
        clock = SystemClock()
        self.fault_ms = clock.wall_ms()
        self._fault.inject(self._run)
        time.sleep(self._fault.hold_s)  # how long the fault lasts
        self._fault.heal(self._run)
        self.healed_ms = clock.wall_ms()


def with_options(job: JobConfig, options: Mapping[str, Any]) -> JobConfig:
    """Return `job` with these options. Raises `UserError` for an unknown one."""
    leaves = dict(flatten(job))
    if unknown := options.keys() - leaves.keys():
        raise UserError(f"--{', --'.join(sorted(unknown)).replace('_', '-')}: the job has no such option")
    return from_options(JobConfig, argparse.Namespace(**{**leaves, **options}))


def carry_out(scenario: str, stack: ChaosStack, job: JobConfig, shape: LoadShape, on_progress: OnProgress) -> Trial:
    """Run the scenario with its own job. Raises `UserError` if it cannot run."""
    with ExitStack() as cleanup:
        fault = cleanup.enter_context(closing(SCENARIOS[scenario](stack)))
        fault.prepare()
        on_progress("job starts", 0)
        run = cleanup.enter_context(running_job(scenario, stack, with_options(job, fault.options)))
        trial = under_fire(scenario, run, fault, replace(shape, burst_factor=fault.burst_factor), on_progress)
        on_progress("job drains", trial.book.settled)
        return drained(run, trial)


@contextmanager
def running_job(name: str, stack: ChaosStack, job: JobConfig) -> Iterator[RunningJob]:
    """Give a job whose slots are ready. Raises `UserError`."""
    begins = BeginLog(stack.local.config.dir / "begins" / name)
    job = with_options(job, {"slot_logging": begins.configuration})
    services = Services(stack.brokers, job.cache.remote.redis_url or stack.redis_url, stack.flink)
    with running(FlinkConfig(), services, name, job) as ready:
        yield RunningJob(ready.job, ready.submitted, ready.reader, begins)


def under_fire(name: str, run: RunningJob, fault: Fault, shape: LoadShape, on_progress: OnProgress) -> Trial:
    """Offer the load, inject the fault, and read until every request has an outcome.

    Waits while answers come, and for each at most the load's patience. Raises `UserError` if the fault cannot be
    injected.
    """
    book, load, kafka = Book(), SteadyLoad(name, shape), run.config.kafka
    collector = Collector(run.reader, kafka, book)
    problems = []
    with ExitStack() as cleanup:
        strike = Strike(fault, run, cleanup.enter_context(ThreadPoolExecutor(1, "fault")))
        producer = cleanup.enter_context(patient_producer(kafka.brokers))
        generator = KafkaLoadGenerator(producer, kafka.requests_topic, load, SystemClock())
        sending = cleanup.enter_context(offered(generator, book.sent))
        last_s = time.monotonic()
        while not (strike.over and sending.done() and not book.missing()):
            if collector.read(POLL_MS) or (strike.begun and not strike.over):
                last_s = time.monotonic()
                on_progress("answered", book.settled)
            if not strike.begun and book.settled >= STRIKE_AFTER * shape.requests:
                strike.begin()
            if time.monotonic() - last_s > shape.patience_s:
                problems.append(f"no answer for {shape.patience_s:.0f} s")
                break
    restarts, evidence = 0, ""
    try:
        restarts, evidence = len(run.submitted.failures()), fault.evidence(run)
    except UserError as error:
        problems.append(str(error))
    return Trial(
        scenario=name,
        job=run.config,
        shape=shape,
        book=book,
        copies=load.copies,
        unacknowledged=sending.result().errors,
        fault_ms=strike.fault_ms,
        healed_ms=strike.healed_ms,
        begins=run.begins,
        restarts=restarts,
        evidence=evidence,
        problems=tuple(problems),
    )


def drained(run: RunningJob, trial: Trial) -> Trial:
    """Add to the trial what the job still answers until it has ended."""
    problems = trial.problems
    try:
        run.submitted.stop(None, DRAIN_TIMEOUT_S)
    except UserError as error:
        problems = (*problems, str(error))
    Collector(run.reader, run.config.kafka, trial.book).rest()
    return replace(trial, problems=problems)

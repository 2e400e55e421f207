"""A job on the local stack that is started once and then gets one load after the other.

So start-up and model loading are not measured. Several jobs can be ready side by side and be compared round by round,
because an idle job costs next to nothing.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from kafka import KafkaConsumer, KafkaProducer
from pydantic import Field

from core.clients import kafka_settings
from core.clock import SystemClock
from core.config import Config
from core.errors import UserError
from core.kafka_config import KafkaConfig
from core.options import to_options
from core.records import DeadLetter, Response
from experiments.collector import wait_for_slots
from experiments.config import ROOT, RunConfig, in_own_space, with_addresses
from experiments.flink_job import FlinkJob
from experiments.kafka_topics import fresh_topics, reading
from experiments.records import ReadySlot
from experiments.run import delete_keys
from experiments.services import Services, services
from local_stack import LocalStack
from local_stack.processes import members
from operators.config import JobConfig
from workloads.kafka_generator import KafkaLoadGenerator, LoadReport, Producer, connected, offered
from workloads.timed_request import Workload

PASS_THROUGH = ROOT / "benchmarks" / "pass_through.py"
PIPELINE = ROOT / "pipelines" / "inference.py"
POLL_MS = 100
STATES = ("busy", "backpressured", "idle")
PARTS = ("python_workers", "task_managers", "job_manager", "broker", "benchmark")
METRICS_POLL_S = 0.5
METRICS_TIMEOUT_S = 45.0
"""Flink updates its metrics only every 10 s."""


class FlinkConfig(Config):
    """The local stack that the jobs run on."""

    stack_dir: Path = Field(
        default=RunConfig.model_fields["stack_dir"].default, description=RunConfig.model_fields["stack_dir"].description
    )
    ready_timeout_s: float = Field(default=300.0, gt=0, description="maximum wait until all slots have loaded")
    idle_timeout_s: float = Field(default=120.0, gt=0, description="maximum wait for the next answer")


@dataclass(frozen=True)
class ReceivedResponse:
    response: Response
    received_ms: float
    """Wall time when the reader of the responses topic had the answer."""

    @property
    def e2e_ms(self) -> float:
        """Time from the creation of the request until the reader had its answer."""
        return self.received_ms - self.response.created_at_ms


@dataclass(frozen=True)
class LoadResult:
    """The outcome of one load; `answers` are in the order of receipt."""

    answers: tuple[ReceivedResponse, ...]
    load: LoadReport

    @property
    def took_s(self) -> float:
        """Time from sending the first request until the reader had the last answer."""
        began_ms = min(answer.response.created_at_ms for answer in self.answers)
        return (self.answers[-1].received_ms - began_ms) / 1000

    @property
    def output_tokens(self) -> int:
        return sum(answer.response.output_tokens for answer in self.answers)

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.took_s

    @property
    def requests_per_s(self) -> float:
        return len(self.answers) / self.took_s


@dataclass(frozen=True)
class Drained:
    """The outcome of a backlog that became visible to its readers all at once."""

    took_s: float
    """Time from that moment until the reader had the last answer."""
    values: tuple[bytes, ...]
    """Values of the answers, in the order of receipt."""

    @property
    def records_per_s(self) -> float:
        return len(self.values) / self.took_s


@dataclass(frozen=True)
class JobUnderTest:
    """A running job whose slots are ready."""

    name: str
    flink: FlinkConfig
    job: JobConfig
    slots: tuple[ReadySlot, ...]
    submitted: FlinkJob
    producer: Producer
    reader: KafkaConsumer
    """Consumer of responses and dead letters."""

    def offer(self, workload: Workload, *, backlog: bool) -> LoadResult:
        """Send `workload` and wait for all answers.

        Raises `UserError` if Kafka does not take it, if a request becomes a dead letter or is answered twice, if
        nothing arrives for `idle_timeout_s`, or if Flink restarted the job.
        """
        clock = SystemClock()
        generator = KafkaLoadGenerator(self.producer, self.job.kafka.requests_topic, workload, clock, backlog=backlog)
        answers: dict[str, ReceivedResponse] = {}
        all_sent = False
        with offered(generator) as load:
            last_s = time.monotonic()
            while not all_sent or len(answers) < load.result().sent:
                if self._receive(answers):
                    last_s = time.monotonic()
                if not all_sent and load.done():
                    all_sent, last_s = True, time.monotonic()
                    if (report := load.result()).errors:
                        raise UserError(f"{self.name}: Kafka did not take {report.errors} of {report.sent} requests")
                if all_sent and time.monotonic() - last_s > self.flink.idle_timeout_s:
                    self.submitted.require_alive(untouched=True)
                    raise UserError(f"{self.name}: {load.result().sent - len(answers)} requests stay unanswered")
        self.submitted.require_alive(untouched=True)
        return LoadResult(tuple(answers.values()), load.result())

    def drain(self, workload: Workload) -> Drained:
        """Send `workload` all at once, and wait for as many answers. Raises `UserError` as `offer` does."""
        drained = drain(self.job.kafka, self.reader, workload, self.flink.idle_timeout_s, self.name)
        self.submitted.require_alive(untouched=True)
        return drained

    def operators(self, records: int) -> "dict[str, OperatorTimes]":
        """Times of Flink's operators since the job began, as soon as they include all `records` requests.

        Chained operators count as one. Raises `UserError` if Flink does not show the times soon enough.
        """
        deadline_s = time.monotonic() + METRICS_TIMEOUT_S
        while True:
            vertices = self.submitted.cluster.get(f"/jobs/{self.submitted.job_id}")["vertices"]
            inference = next(vertex for vertex in vertices if "inference" in vertex["name"])
            # One row per slot came for the warm-up.
            if inference["metrics"]["read-records"] >= records + self.job.parallelism:
                # A finished source has no metrics any more.
                alive = [vertex for vertex in vertices if vertex["status"] == "RUNNING"]
                return {vertex["name"].replace(f"{self.job.job_name}.", ""): _times(vertex) for vertex in alive}
            if time.monotonic() > deadline_s:
                raise UserError(f"{self.name}: Flink's metrics lag by more than {METRICS_TIMEOUT_S:.0f} s")
            time.sleep(METRICS_POLL_S)

    def _receive(self, answers: dict[str, ReceivedResponse]) -> bool:
        polled = self.reader.poll(timeout_ms=POLL_MS)
        received_ms = SystemClock().wall_ms()
        for partition, records in polled.items():
            for record in records:
                if partition.topic == self.job.kafka.dead_letters_topic:
                    raise UserError(f"{self.name}: {DeadLetter.model_validate_json(record.value).reason}")
                response = Response.model_validate_json(record.value)
                if response.request_id in answers:
                    raise UserError(f"{self.name}: {response.request_id} was answered twice")
                answers[response.request_id] = ReceivedResponse(response, received_ms)
        return bool(polled)


def drain(kafka: KafkaConfig, reader: KafkaConsumer, workload: Workload, idle_timeout_s: float, name: str) -> Drained:
    """Send `workload` in one transaction, and read as many answers as there are requests, without parsing them.

    No request is visible before the commit, so the work of sending is not measured. Raises `UserError` for a dead
    letter, or if nothing arrives for `idle_timeout_s`.
    """
    clock = SystemClock()
    producer = KafkaProducer(
        **kafka_settings(kafka.brokers, kafka.access), acks="all", transactional_id=f"{name}-{time.time_ns()}"
    )
    with closing(producer):
        producer.init_transactions()
        producer.begin_transaction()
        count = 0
        for timed in workload:
            request = timed.created(clock.wall_ms())
            producer.send(kafka.requests_topic, value=request.to_json().encode(), key=request.session_id.encode())
            count += 1
        producer.flush()
        began_s = last_s = time.monotonic()
        producer.commit_transaction()
        values: list[bytes] = []
        while len(values) < count:
            for partition, records in reader.poll(timeout_ms=POLL_MS).items():
                last_s = time.monotonic()
                if partition.topic == kafka.dead_letters_topic:
                    raise UserError(f"{name}: {DeadLetter.model_validate_json(records[0].value).reason}")
                values += [record.value for record in records]
            if time.monotonic() - last_s > idle_timeout_s:
                raise UserError(f"{name}: {count - len(values)} of {count} requests stay unanswered")
    return Drained(last_s - began_s, tuple(values))


@dataclass(frozen=True)
class OperatorTimes:
    """Times of the task threads of an operator, summed over its subtasks.

    A thread is idle if it neither computes nor waits for its reader. While it waits for its worker, the process in
    which a Python operator computes, it counts as busy.
    """

    subtasks: int
    busy_ms: float
    backpressured_ms: float

    def shares(self, before: "OperatorTimes", took_s: float) -> dict[str, float]:
        """Percent of a subtask's time in each of `STATES` since `before`, over a load that took `took_s`."""
        whole_ms = 1000 * took_s * self.subtasks
        busy = 100 * (self.busy_ms - before.busy_ms) / whole_ms
        backpressured = 100 * (self.backpressured_ms - before.backpressured_ms) / whole_ms
        return dict(zip(STATES, (busy, backpressured, max(0.0, 100 - busy - backpressured)), strict=True))


def _times(vertex: Mapping[str, Any]) -> OperatorTimes:
    metrics = vertex["metrics"]
    busy_ms, backpressured_ms = metrics["accumulated-busy-time"], metrics["accumulated-backpressured-time"]
    return OperatorTimes(vertex["parallelism"], float(busy_ms), float(backpressured_ms))


@contextmanager
def cluster(flink: FlinkConfig, slots: int, *, remote: bool = False) -> Iterator[Services]:
    """Give Kafka and Flink with at least `slots` slots, and Redis if `remote`. Raises `UserError`."""
    run = RunConfig(stack_dir=flink.stack_dir, remote=remote)
    with services(run, JobConfig(parallelism=slots)) as found:
        yield found


@contextmanager
def running(
    flink: FlinkConfig, found: Services, name: str, job: JobConfig, script: Path = PIPELINE
) -> Iterator[JobUnderTest]:
    """Give `job` with its slots ready; cancel it at the end, and delete its topics and keys. Raises `UserError`."""
    space = f"bench-{name}-{time.time_ns() // 1_000_000}"
    job = in_own_space(with_addresses(job, brokers=found.brokers, redis_url=found.redis_url), space)
    with ExitStack() as cleanup:
        if found.redis_url is not None:
            cleanup.callback(delete_keys, found.redis_url, space, job.cache.remote.access)
        cleanup.enter_context(fresh_topics(job.kafka, partitions=job.parallelism))
        cleanup.callback(_cancel_named, found, space)
        submitted = found.flink.submit(script, to_options(job))
        ready = cleanup.enter_context(reading(job.kafka, [job.kafka.ready_topic]))
        slots = wait_for_slots(
            ready,
            job.parallelism,
            flink.ready_timeout_s,
            watch=lambda: submitted.require_alive(untouched=True),
            on_progress=lambda count: None,
        )
        answers = cleanup.enter_context(reading(job.kafka, [job.kafka.responses_topic, job.kafka.dead_letters_topic]))
        producer = cleanup.enter_context(connected(job.kafka))
        yield JobUnderTest(name, flink, job, slots, submitted, producer, answers)


def _cancel_named(found: Services, name: str) -> None:
    """Cancel jobs by name, because Flink may have accepted a submission that was interrupted."""
    for accepted in found.flink.jobs_named(name):
        accepted.cancel()


class CpuSeconds:
    """CPU time of the local stack and of this process, by kind of process."""

    def __init__(self, stack_dir: Path) -> None:
        self._stack_dir = stack_dir

    def by_part(self) -> dict[str, float]:
        """Seconds so far of the running processes: `python_workers`, `task_managers`, `broker`, ..."""
        own = psutil.Process().cpu_times()
        seconds = {"benchmark": own.user + own.system}
        for part, process in self._processes():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                seconds[part] = seconds.get(part, 0.0) + times.user + times.system
        return seconds

    def total_s(self) -> float:
        """Seconds so far of the stack's processes and of this process's children, including ended ones."""
        this = psutil.Process()
        # If this process started the stack, the stack's processes are children too.
        others = {process.pid: process for process in this.children(recursive=True)}
        others |= {process.pid: process for _, process in self._processes()}
        seconds = sum(this.cpu_times()[2:4])
        for process in others.values():
            with suppress(psutil.NoSuchProcess):
                seconds += sum(process.cpu_times()[:4])
        return seconds

    def _processes(self) -> Iterator[tuple[str, psutil.Process]]:
        stack = LocalStack.running_in(self._stack_dir)
        for health in stack.health() if stack is not None else ():
            for started in health.processes:
                for process in members(started):
                    yield _part(started.service, started.name, process.name()), process


def _part(service: str, name: str, process: str) -> str:
    if not name.startswith("taskmanager"):
        return {"Kafka": "broker", "Redis": "redis"}.get(service, "job_manager")
    return "task_managers" if process == "java" else "python_workers"

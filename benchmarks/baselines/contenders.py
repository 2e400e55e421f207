"""Our job and each alternative behind one interface: the same requests in, time and answers out."""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from benchmarks.baselines.group import WorkerGroup
from benchmarks.baselines.worker import Answers, Order
from benchmarks.on_flink import POLL_MS, JobUnderTest
from core.clock import SystemClock
from core.errors import UserError
from core.records import Request
from experiments.config import in_own_space
from experiments.kafka_topics import fresh_topics, reading
from operators.config import JobConfig
from workloads.kafka_generator import KafkaLoadGenerator, connected, offered
from workloads.timed_request import Workload


@dataclass(frozen=True)
class Taken:
    """The outcome of one load."""

    took_s: float
    """Time from sending the first request until the last answer."""
    answers: Answers

    @property
    def tokens_per_s(self) -> float:
        return sum(len(token_ids) for token_ids in self.answers.values()) / self.took_s


class Contender(Protocol):
    def answer(self, workload: Workload) -> Taken:
        """Answer `workload` as one backlog. Raises `UserError`."""
        ...


class OurJob:
    """A running job. Its time ends when a reader of the responses topic has the last answer."""

    def __init__(self, job: JobUnderTest) -> None:
        self._job = job

    def answer(self, workload: Workload) -> Taken:
        outcome = self._job.offer(workload, backlog=True)
        answers = {one.response.request_id: list(one.response.token_ids) for one in outcome.answers}
        return Taken(outcome.took_s, answers)


class InProcess:
    """A baseline without Kafka. Its time ends when the last answer is made."""

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group

    def answer(self, workload: Workload) -> Taken:
        requests = [timed.created(0.0) for timed in workload]
        took_s, answers = self._group.answer(orders_of(requests, len(self._group.workers)))
        return Taken(took_s, answers)


class OnKafka:
    """A baseline that reads and writes topics of Kafka, with one partition per process.

    It is measured as our jobs are: by the load generator's clock and a reader of the responses topic.
    """

    def __init__(self, group: WorkerGroup, name: str, brokers: str, idle_timeout_s: float) -> None:
        self._group = group
        self._name = name
        self._brokers = brokers
        self._idle_timeout_s = idle_timeout_s

    def answer(self, workload: Workload) -> Taken:
        space = in_own_space(JobConfig(), f"bench-{self._name}-{time.time_ns() // 1_000_000}")
        kafka = space.kafka.model_copy(update={"brokers": self._brokers})
        workers = self._group.workers
        with fresh_topics(kafka, partitions=len(workers)), reading(kafka, [kafka.responses_topic]) as consumer:
            for partition, worker in enumerate(workers):
                worker.prepare(
                    Order(
                        brokers=kafka.brokers,
                        requests_topic=kafka.requests_topic,
                        responses_topic=kafka.responses_topic,
                        partitions=(partition,),
                    )
                )
            for worker in workers:
                worker.go()
            created_ms: dict[str, float] = {}

            def on_sent(request: Request) -> None:
                created_ms[request.request_id] = request.created_at_ms

            answers: Answers = {}
            received_ms = 0.0
            with ExitStack() as sending:
                producer = sending.enter_context(connected(kafka))
                generator = KafkaLoadGenerator(producer, kafka.requests_topic, workload, SystemClock(), backlog=True)
                load = sending.enter_context(offered(generator, on_sent))
                last_s = time.monotonic()
                while not load.done() or len(answers) < load.result().acknowledged:
                    polled = consumer.poll(timeout_ms=POLL_MS)
                    for record in (record for records in polled.values() for record in records):
                        received_ms, last_s = SystemClock().wall_ms(), time.monotonic()
                        answer = json.loads(record.value)
                        answers[answer["request_id"]] = answer["token_ids"]
                    for worker in workers:
                        worker.require_alive()
                    if time.monotonic() - last_s > self._idle_timeout_s:
                        raise UserError(
                            f"{self._name}: no answer for {self._idle_timeout_s:.0f} s, {len(answers)} of "
                            f"{len(created_ms)} are there; allow more with --idle-timeout-s"
                        )
                if load.result().errors:
                    raise UserError(f"{self._name}: Kafka did not take {load.result().errors} requests")
            for worker in workers:
                worker.stop()
            for worker in workers:
                worker.done()
        return Taken((received_ms - min(created_ms.values())) / 1000, answers)


def orders_of(requests: Sequence[Request], workers: int) -> list[Order]:
    """Deal the requests out to the workers in turn."""
    return [Order(requests=tuple(requests[worker::workers])) for worker in range(workers)]

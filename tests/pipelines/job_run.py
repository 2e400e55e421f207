"""A helper for tests of jobs: one job with its own topics, and the records it has written."""

import json
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import psutil
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import ConfigResource

from core.clients import kafka_settings
from core.kafka_config import KafkaAccessConfig, KafkaConfig
from core.records import DeadLetter, Request, Response
from experiments.flink_job import FlinkCluster, FlinkJob
from local_stack import LocalStack
from local_stack.processes import members

ROOT = Path(__file__).resolve().parents[2]
OPEN = KafkaAccessConfig()


class Run:
    """One job with its own topics, and the records it has written."""

    def __init__(
        self,
        stack: LocalStack,
        flink: FlinkCluster,
        model: Path,
        prefix: str,
        script: Path,
        *,
        brokers: str | None = None,
        access: KafkaAccessConfig = OPEN,
    ) -> None:
        self._script = script
        self._addresses = stack.addresses()
        self._flink = flink
        self._model = model
        self.kafka = KafkaConfig(
            brokers=brokers or self._addresses.brokers, topic_prefix=prefix, consumer_group=prefix, access=access
        )
        self._clients = kafka_settings(self.kafka.brokers, access)
        self._producer = KafkaProducer(**self._clients, max_request_size=2 << 20)
        self._consumer: KafkaConsumer | None = None
        self.sent: list[Request] = []
        self.ready: list[dict[str, object]] = []
        self.responses: list[Response] = []
        self.letters: list[DeadLetter] = []
        self.job: FlinkJob | None = None

    def submit(self, *options: str, savepoint: str | None = None) -> FlinkJob:
        self.job = self._flink.submit(
            self._script,
            savepoint=savepoint,
            options=[
                *("--brokers", self.kafka.brokers, "--topic-prefix", self.kafka.topic_prefix),
                *("--consumer-group", self.kafka.consumer_group, "--redis-url", self._addresses.redis_url),
                *("--redis-namespace", self.kafka.topic_prefix, "--model", str(self._model), "--chunk-tokens", "8"),
                *("--max-model-len", "128", "--device", "cpu", "--threads", "1", *options),
            ],
        )
        return self.job

    def producer(self, **settings: object) -> KafkaProducer:
        """Make another producer than the run's own."""
        return KafkaProducer(**self._clients, **settings)

    def compress(self, topic: str, codec: str) -> None:
        """Let the broker compress a topic."""
        with closing(KafkaAdminClient(**self._clients)) as admin:
            admin.alter_configs([ConfigResource("topic", topic, {"compression.type": codec})])

    def send(self, count: int, start: int = 0, *, by: KafkaProducer | None = None, **changes: object) -> None:
        """Send requests. `by` is another producer than the run's own."""
        producer = by or self._producer
        for number in range(start, start + count):
            fields = {
                "request_id": f"r{number}",
                "session_id": f"s{number % 7}",
                "user_id": "u",
                "max_new_tokens": 4,
                "created_at_ms": time.time() * 1e3,
                "prompt": f"session {number % 7} " + "word " * (number // 7 % 5 + 1),
            }
            request = Request(**(fields | changes))
            self.sent.append(request)
            producer.send(self.kafka.requests_topic, request.to_json().encode(), key=request.session_id.encode())
        producer.flush()

    def send_raw(self, raw: bytes | None) -> None:
        self._producer.send(self.kafka.requests_topic, raw, key=b"hostile")
        self._producer.flush()

    def read_until(self, done, timeout_s: float = 240.0) -> None:
        """Read all topics until `done(self)`; fails with what was read if that takes too long."""
        if self._consumer is None:
            self._consumer = KafkaConsumer(**self._clients, auto_offset_reset="earliest", group_id=None)
            partitions = [
                TopicPartition(topic, number)
                for topic in self.kafka.topics[1:]
                for number in self._consumer.partitions_for_topic(topic)
            ]
            self._consumer.assign(partitions)
        deadline_s = time.monotonic() + timeout_s
        while not done(self):
            assert time.monotonic() < deadline_s, (len(self.responses), self.letters, self.ready)
            if self.job is not None and not self.responses:
                assert self.job.state() != "FAILED", self.job.failures()
            for partition, records in self._consumer.poll(timeout_ms=200).items():
                for record in records:
                    if partition.topic == self.kafka.responses_topic:
                        self.responses.append(Response.model_validate_json(record.value))
                        assert record.key.decode() == self.responses[-1].request_id
                    elif partition.topic == self.kafka.dead_letters_topic:
                        self.letters.append(DeadLetter.model_validate_json(record.value))
                    else:
                        self.ready.append(json.loads(record.value))

    def settle(self) -> None:
        """Read the topics up to the job's end."""
        assert self.job is not None
        self.job.wait_ended(240)
        self.read_until(lambda run: True)
        assert self._consumer is not None
        ends = self._consumer.end_offsets(list(self._consumer.assignment()))
        self.read_until(lambda run: all(self._consumer.position(p) >= end for p, end in ends.items()))

    def answered(self) -> list[str]:
        return sorted(answer.request_id for answer in self.responses)

    def close(self) -> None:
        if self.job is not None:
            self.job.cancel()
        if self._consumer is not None:
            self._consumer.close()
        self._producer.close()


def ids(count: int) -> list[str]:
    return sorted(f"r{number}" for number in range(count))


def checkpoints(run: Run) -> int:
    """Number of the job's completed checkpoints."""
    answer = run.job.cluster.get(f"/jobs/{run.job.job_id}/checkpoints")
    return int(answer["counts"]["completed"])


def processes_of(stack: LocalStack) -> list[psutil.Process]:
    """All processes of the stack, including those of its running jobs."""
    return [process for part in stack.health() for started in part.processes for process in members(started)]


def listening_on(processes: Iterable[psutil.Process]) -> set[str]:
    """Addresses at which these processes accept connections."""
    return {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


def take_checkpoint(run: Run) -> None:
    """Trigger a checkpoint, and wait until it is complete."""
    _ask(run, "checkpoints", "checkpoints", {"checkpointType": "CONFIGURED"})


def stop_with_savepoint(run: Run, folder: Path, *, drain: bool = False) -> str:
    """Stop the run's job; return the savepoint's path. Without `drain` it has the requests in flight."""
    location = _ask(run, "stop", "savepoints", {"targetDirectory": str(folder), "drain": drain})["location"]
    assert run.job.wait_ended(240) == "FINISHED"
    return str(location)


def _ask(run: Run, order: str, answers: str, body: dict[str, object]) -> dict[str, object]:
    job = f"/jobs/{run.job.job_id}"
    trigger = run.job.cluster.post(f"{job}/{order}", body)["request-id"]
    deadline_s = time.monotonic() + 240
    while (answer := run.job.cluster.get(f"{job}/{answers}/{trigger}"))["status"]["id"] != "COMPLETED":
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert "failure-cause" not in answer["operation"], answer
    return dict(answer["operation"])


def worker(stack: LocalStack) -> int:
    """The Python worker of the only used slot: the youngest below the stack's TaskManager."""
    return _youngest(stack, "beam_boot")


def slot_process(stack: LocalStack) -> int:
    """The process of the only used slot."""
    return _youngest(stack, "operators.slots.server")


def _youngest(stack: LocalStack, named: str) -> int:
    folder = str(stack.config.dir)
    found = [
        process
        for process in psutil.process_iter(["cmdline", "create_time"])
        if any(named in part for part in process.info["cmdline"] or ())
        and any(folder in part for parent in process.parents() for part in parent.cmdline())
    ]
    return int(max(found, key=lambda process: process.info["create_time"]).pid)

"""The job on the real Flink, Kafka and Redis: every request is answered once, whatever else the topic holds."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from transformers import Qwen2Config

from core.config import JobConfig, KafkaConfig
from core.errors import UserError
from core.records import DeadLetter, Request, Response
from experiments.flink_job import FlinkCluster, FlinkJob
from local_stack import LocalStack, flink_cli
from pipelines import cache_experiment
from pipelines.connectors import ensure_topics
from tests.inference_service.engine_helpers import LAYERS_OF_TWO, save_tiny

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
JOB = ROOT / "pipelines" / "cache_experiment.py"
HOSTILE: list[bytes | None] = [
    b"{",
    b"\xff\xfe\x00 no text",
    None,
    b'{"request_id": "x", "colour": 1}',
    b"[" * 5000,
    b'"' + b"a" * 900_000,
    b'{"prompt_token_ids": [' + b'"",' * 300_000 + b"0]}",
    b"{" + b",".join(b'"%d": 0' % number for number in range(90_000)) + b"}",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("job") / "tiny-qwen2", Qwen2Config(**LAYERS_OF_TWO))


@pytest.fixture(scope="module")
def flink(stack: LocalStack) -> FlinkCluster:
    argv, env = flink_cli(stack)
    return FlinkCluster(stack.addresses().flink_rest_url, argv, env, ROOT)


class Run:
    """One job on topics of its own, and what it has written."""

    def __init__(self, stack: LocalStack, flink: FlinkCluster, model: Path, prefix: str) -> None:
        self._addresses = stack.addresses()
        self._flink = flink
        self._model = model
        self.kafka = KafkaConfig(brokers=self._addresses.brokers, topic_prefix=prefix, consumer_group=prefix)
        self._producer = KafkaProducer(bootstrap_servers=self.kafka.brokers, max_request_size=2 << 20)
        self._consumer: KafkaConsumer | None = None
        self.ready: list[dict[str, object]] = []
        self.responses: list[Response] = []
        self.letters: list[DeadLetter] = []
        self.job: FlinkJob | None = None

    def submit(self, *options: str) -> FlinkJob:
        self.job = self._flink.submit(
            JOB,
            [
                *("--brokers", self.kafka.brokers, "--topic-prefix", self.kafka.topic_prefix),
                *("--consumer-group", self.kafka.consumer_group, "--redis-url", self._addresses.redis_url),
                *("--redis-namespace", self.kafka.topic_prefix, "--model", str(self._model), "--chunk-tokens", "8"),
                *("--max-model-len", "128", "--device", "cpu", "--threads", "1", *options),
            ],
        )
        return self.job

    def send(self, count: int, start: int = 0, **changes: object) -> None:
        for number in range(start, start + count):
            fields = {
                "request_id": f"r{number}",
                "session_id": f"s{number % 7}",
                "user_id": "u",
                "max_new_tokens": 4,
                "created_at_ms": time.time() * 1e3,
                "prompt": f"session {number % 7} " + "word " * (number // 7 % 5 + 1),
            }
            record = Request(**(fields | changes)).to_json().encode()
            self._producer.send(self.kafka.requests_topic, record, key=fields["session_id"].encode())
        self._producer.flush()

    def send_raw(self, raw: bytes | None) -> None:
        self._producer.send(self.kafka.requests_topic, raw, key=b"hostile")
        self._producer.flush()

    def read_until(self, done, timeout_s: float = 90.0) -> None:
        """Read all topics until `done(self)`; fails with what was read if that takes too long."""
        if self._consumer is None:
            self._consumer = KafkaConsumer(
                bootstrap_servers=self.kafka.brokers, auto_offset_reset="earliest", group_id=None
            )
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
        """Read what was written until the job's end."""
        assert self.job is not None
        self.job.wait_ended(120)
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


@pytest.fixture
def run(stack: LocalStack, flink: FlinkCluster, model: Path, request: pytest.FixtureRequest) -> Iterator[Run]:
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)[:80]
    made = Run(stack, flink, model, f"job-{name}")
    yield made
    made.close()


def ids(count: int) -> list[str]:
    return sorted(f"r{number}" for number in range(count))


@pytest.mark.parametrize("parallelism", [1, 2, 4])
def test_a_bounded_run_answers_every_request_and_keeps_every_bad_record(run: Run, parallelism: int) -> None:
    """53 requests in batches of up to 4: the last batch of a slot is a partial one, and input ends while it waits."""
    ensure_topics(JobConfig(parallelism=parallelism, kafka=run.kafka))
    run.send(53)
    for raw in HOSTILE:
        run.send_raw(raw)
    run.send(1, start=53, prompt="x" * 200)

    run.submit("--parallelism", str(parallelism), "--batch-size", "4", "--max-wait-ms", "3600000", "--bounded")
    run.settle()
    assert run.job.state() == "FINISHED"
    assert run.job.failures() == []
    assert sorted(ready["slot"] for ready in run.ready) == list(range(parallelism))
    assert run.answered() == ids(53)
    assert sorted(str(letter.raw) for letter in run.letters if letter.stage == "decode") == sorted(map(str, HOSTILE))
    (too_long,) = [letter for letter in run.letters if letter.stage == "inference"]
    assert too_long.request_id == "r53"
    assert "--max-model-len" in too_long.reason
    # Sessions keep their slot, each slot has its own cache, and it is used.
    slots: dict[str, set[int]] = {}
    for answer in run.responses:
        slots.setdefault(answer.session_id, set()).add(answer.slot)
    assert all(len(found) == 1 for found in slots.values())
    assert {slot for found in slots.values() for slot in found} <= set(range(parallelism))
    assert sum(answer.local_tokens for answer in run.responses) > 0
    assert max(answer.batch_size for answer in run.responses) == 4


def test_a_drain_answers_what_waits_for_its_batch(run: Run) -> None:
    run.submit("--parallelism", "2", "--batch-size", "4", "--max-wait-ms", "3600000")
    run.read_until(lambda r: len(r.ready) == 2)
    run.send(30)
    # Full batches are answered; what is left of 30 over two slots waits without end.
    run.read_until(lambda r: len(r.responses) >= 24)
    assert run.answered() != ids(30)
    run.job.stop(None, 90)
    run.settle()
    assert run.answered() == ids(30)


def test_requests_that_wait_outlive_a_killed_worker(run: Run, stack: LocalStack) -> None:
    """The worker is killed while requests wait in state for their batch: after the restart they are answered."""
    run.submit("--parallelism", "1", "--batch-size", "8", "--max-wait-ms", "4000", "--checkpoint-interval-ms", "500")
    run.read_until(lambda r: len(r.ready) == 1)
    run.send(5)
    time_of_checkpoint = _checkpoints(run)
    deadline_s = time.monotonic() + 30
    while _checkpoints(run) < time_of_checkpoint + 2:
        assert time.monotonic() < deadline_s
    assert run.responses == []
    os.kill(_worker(stack), signal.SIGKILL)
    run.read_until(lambda r: len({answer.request_id for answer in r.responses}) == 5, timeout_s=120)
    assert set(run.answered()) == set(ids(5))
    assert run.job.state() == "RUNNING"


def test_the_job_works_without_redis_and_closes_batches_by_time(run: Run) -> None:
    options = ["--redis-url", "redis://127.0.0.1:1/0", "--batch-size", "8", "--max-wait-ms", "50"]
    run.submit("--parallelism", "1", *options)
    run.read_until(lambda r: len(r.ready) == 1)
    run.send(10)
    run.read_until(lambda r: len(r.responses) == 10)
    assert run.answered() == ids(10)
    assert sum(answer.local_tokens for answer in run.responses) > 0
    assert sum(answer.remote_tokens for answer in run.responses) == 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--strategy", "GUESS"], "--strategy: Input should be 'STATIC', 'FLUID' or 'FREQUENCY'"),
        (["--model", "/nowhere/model"], "--model: no config.json in '/nowhere/model'"),
        (["--redis-url", "http://example"], "redis_url: not a Redis URL"),
        (["--batch-size", "9", "--max-running", "8"], "--batch-size is above --max-running"),
        (["--max-wait-ms", "-1"], "--max-wait-ms: Input should be greater than or equal to 0"),
    ],
)
def test_bad_options_are_told_before_anything_starts(
    options: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(JOB), *options])
    with pytest.raises(UserError) as raised:
        cache_experiment.main()
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--brokers", "127.0.0.1:1"], "brokers: no Kafka broker answers at '127.0.0.1:1'"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_a_command_that_can_not_start_prints_one_line_and_exits_2(options: list[str], complaint: str) -> None:
    done = subprocess.run(
        [sys.executable, str(JOB), *options], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def _checkpoints(run: Run) -> int:
    answer = run.job.cluster.get(f"/jobs/{run.job.job_id}/checkpoints")
    return int(answer["counts"]["completed"])


def _worker(stack: LocalStack) -> int:
    """The Python worker of the one slot in use: the youngest below the stack's own TaskManager."""
    folder = str(stack.config.dir)
    workers = [
        process
        for process in psutil.process_iter(["cmdline", "create_time"])
        if any("beam_boot" in part for part in process.info["cmdline"] or ())
        and any(folder in part for parent in process.parents() for part in parent.cmdline())
    ]
    return int(max(workers, key=lambda process: process.info["create_time"]).pid)

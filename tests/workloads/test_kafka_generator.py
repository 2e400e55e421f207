import itertools
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer
from kafka.admin import NewTopic
from kafka.errors import KafkaError, KafkaTimeoutError, MessageSizeTooLargeError

from core.clock import ManualClock, SystemClock
from core.errors import UserError
from core.kafka_config import KafkaConfig
from core.records import Request
from local_stack import LocalStack
from workloads import __main__ as workloads_command
from workloads.catalogue import make_workload
from workloads.config import PhasesConfig, TraceConfig, WorkloadConfig
from workloads.kafka_generator import KafkaLoadGenerator, LoadReport, connect, connected
from workloads.registry import WORKLOADS

INTERVAL_MS = 100.0


class FakeDelivery:
    def __init__(self) -> None:
        self.acknowledge: Callable[[Any], None] = lambda _: None
        self.fail: Callable[[BaseException], None] = lambda _: None

    def add_callback(self, callback: Callable[[Any], None]) -> None:
        self.acknowledge = callback

    def add_errback(self, errback: Callable[[BaseException], None]) -> None:
        self.fail = errback


@dataclass
class FakeProducer:
    """Acknowledges records in order at the flush. `outcomes` has a delivery's error by the record's number."""

    clock: ManualClock
    outcomes: dict[int, KafkaError] = field(default_factory=dict)
    refused: dict[int, KafkaError] = field(default_factory=dict)
    send_takes_ms: float = 0.0
    flush_error: KafkaError | None = None
    flushes: int = 0
    records: list[tuple[str, bytes, bytes]] = field(default_factory=list)
    deliveries: list[FakeDelivery] = field(default_factory=list)

    def send(self, topic: str, value: bytes, key: bytes) -> FakeDelivery:
        number = len(self.records)
        self.records.append((topic, key, value))
        self.clock.advance(self.send_takes_ms)
        if number in self.refused:
            raise self.refused[number]
        self.deliveries.append(FakeDelivery())
        return self.deliveries[-1]

    def flush(self, timeout: float) -> None:
        assert timeout > 0
        self.flushes += 1
        for number, delivery in enumerate(self.deliveries):
            if number in self.outcomes:
                delivery.fail(self.outcomes[number])
            elif not (self.flush_error and number == len(self.deliveries) - 1):
                delivery.acknowledge(None)
        if self.flush_error:
            raise self.flush_error


class ManualStop:
    """A stop event whose waits advance the clock. It is set after `after` requests."""

    def __init__(self, clock: ManualClock, after: int = 10**9) -> None:
        self.clock = clock
        self.left = after

    def wait(self, timeout: float) -> bool:
        self.left -= 1
        if self.left < 0:
            return True
        self.clock.advance(timeout * 1000)
        return False


def phases(requests: int) -> WorkloadConfig:
    return WorkloadConfig(requests=requests, seed=1, phases=PhasesConfig(base_interval_ms=2 * INTERVAL_MS))


def run(
    producer: FakeProducer, requests: int = 5, *, backlog: bool = False, stop: ManualStop | None = None
) -> tuple[LoadReport, list[Request]]:
    sent: list[Request] = []
    generator = KafkaLoadGenerator(
        producer, "llm.requests", make_workload(phases(requests)), producer.clock, backlog=backlog
    )
    return generator.run(stop or ManualStop(producer.clock), sent.append), sent


def test_sends_each_request_when_it_is_due_with_the_session_as_key() -> None:
    producer = FakeProducer(ManualClock(1e12))
    report, sent = run(producer)
    assert [Request.from_json(value) for _, _, value in producer.records] == sent
    assert [(topic, key.decode()) for topic, key, _ in producer.records] == [
        ("llm.requests", request.session_id) for request in sent
    ]
    expected = [timed.created(1e12 + timed.at_ms) for timed in make_workload(phases(5))]
    assert sent == expected
    assert (report.sent, report.acknowledged, report.errors, report.first_error) == (5, 5, 0, None)
    assert report.duration_ms == pytest.approx(3 * INTERVAL_MS + INTERVAL_MS * 2 / 3)
    assert report.offered_rate == pytest.approx(4000 / report.duration_ms)
    assert report.reached_rate == pytest.approx(report.offered_rate)


FIBONACCI = '''
"""Sends requests at growing gaps: each prompt is as long as the two before it together."""

from workloads.timed_request import TimedRequest, request_id


class Fibonacci:
    def __init__(self, config):
        self._config = config

    @property
    def requests(self):
        return self._config.requests

    def adjustments(self):
        return {}

    def __iter__(self):
        tokens, following = 1, 2
        for index in range(self._config.requests):
            yield TimedRequest(
                at_ms=100.0 * tokens,
                request_id=request_id("fibonacci", self._config.seed, index),
                session_id="s1",
                user_id="u1",
                max_new_tokens=self._config.max_new_tokens,
                prompt_token_ids=(7,) * tokens,
            )
            tokens, following = following, tokens + following
'''


def test_a_workload_is_added_by_one_file_and_one_line(
    register: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register(WORKLOADS, "fibonacci", "Fibonacci", FIBONACCI)
    producer = FakeProducer(ManualClock(1e12))
    generator = KafkaLoadGenerator(
        producer, "llm.requests", make_workload(WorkloadConfig(workload="fibonacci", requests=5)), producer.clock
    )
    report = generator.run(ManualStop(producer.clock))
    sent = [Request.from_json(value) for _, _, value in producer.records]
    assert [len(request.prompt_token_ids or ()) for request in sent] == [1, 2, 3, 5, 8]
    assert report.acknowledged == 5
    options = ["--workload", "fibonacci", "--requests", "5", "--run", "r", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["workloads", *options])
    workloads_command.main()
    printed = [Request.from_json(line) for line in capsys.readouterr().out.splitlines()]
    assert [request.created_at_ms for request in printed] == [request.created_at_ms - 1e12 for request in sent]


def test_a_producer_slower_than_the_schedule_shows_as_lag_and_not_in_creation_times() -> None:
    producer = FakeProducer(ManualClock(1e12), send_takes_ms=2 * INTERVAL_MS)
    report, sent = run(producer, requests=4)
    assert [request.created_at_ms - 1e12 for request in sent] == [timed.at_ms for timed in make_workload(phases(4))]
    assert report.lag.max_ms == pytest.approx(6 * INTERVAL_MS - sent[-1].created_at_ms + 1e12)
    assert report.lag.late == 3
    assert report.reached_rate is not None
    assert report.offered_rate is not None
    assert report.reached_rate < report.offered_rate


def test_a_backlog_is_sent_without_waiting() -> None:
    producer = FakeProducer(ManualClock(1e12), send_takes_ms=1.0)
    report, sent = run(producer, backlog=True)
    assert [request.created_at_ms - 1e12 for request in sent] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert report.offered_rate is None
    assert report.reached_rate == pytest.approx(800.0)
    assert "offered rate:         -" in report.lines()


def test_what_kafka_does_not_take_is_counted_and_the_first_reason_kept() -> None:
    producer = FakeProducer(
        ManualClock(), outcomes={2: KafkaTimeoutError("took\ntoo long")}, refused={1: MessageSizeTooLargeError("big")}
    )
    report, sent = run(producer)
    assert (report.sent, len(sent), report.acknowledged, report.errors) == (5, 5, 3, 2)
    assert report.first_error is not None
    assert report.first_error.endswith("big")


def test_what_has_no_outcome_when_the_flush_gives_up_is_an_error() -> None:
    report, _ = run(FakeProducer(ManualClock(), flush_error=KafkaTimeoutError("gave up")))
    assert (report.sent, report.acknowledged, report.errors) == (5, 4, 1)
    assert "gave up" in str(report.first_error)


def test_a_stop_ends_the_load_and_reports_what_was_sent() -> None:
    producer = FakeProducer(ManualClock())
    report, sent = run(producer, requests=100, stop=ManualStop(producer.clock, after=7))
    assert report.sent == report.acknowledged == len(sent)
    assert 0 < report.sent < 100


def test_runs_in_a_thread_until_its_event_is_set() -> None:
    stop, first = threading.Event(), threading.Event()
    reports: list[LoadReport] = []
    generator = KafkaLoadGenerator(
        FakeProducer(ManualClock()), "t", make_workload(WorkloadConfig(requests=10_000)), SystemClock()
    )
    thread = threading.Thread(target=lambda: reports.append(generator.run(stop, on_sent=lambda _: first.set())))
    thread.start()
    assert first.wait(10)
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    assert 0 < reports[0].sent < 10_000


def test_a_trace_that_turns_bad_is_reported_after_what_came_before_is_delivered(
    write_trace: Callable[..., Path],
) -> None:
    row = {"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [0]}
    replay = TraceConfig(trace=write_trace([row, row, "broken"]))
    producer = FakeProducer(ManualClock())
    workload = make_workload(WorkloadConfig(workload="mooncake", replay=replay))
    with pytest.raises(UserError, match="line 3"):
        KafkaLoadGenerator(producer, "t", workload, producer.clock).run()
    assert (len(producer.records), producer.flushes) == (2, 1)


def test_a_replay_says_what_it_left_out(made_burstgpt_sessions: Path) -> None:
    producer = FakeProducer(ManualClock())
    workload = make_workload(WorkloadConfig(workload="burstgpt", replay=TraceConfig(trace=made_burstgpt_sessions)))
    report = KafkaLoadGenerator(producer, "t", workload, producer.clock, backlog=True).run()
    assert [key for _, key, _ in producer.records].count(b"user-trace-7/s1") == 4
    assert report.sent == 7
    assert "skipped failed calls: 1" in report.lines()


@pytest.fixture
def kafka_config(stack: LocalStack) -> Iterator[KafkaConfig]:
    """The test's own requests topic in the real Kafka."""
    config = KafkaConfig(brokers=stack.addresses().brokers, topic_prefix=f"test-{uuid.uuid4().hex[:12]}")
    admin = KafkaAdminClient(bootstrap_servers=config.brokers)
    # A broker recompresses records of another codec with its topic's codec.
    codec = {"compression.type": "zstd"}
    admin.create_topics([NewTopic(config.requests_topic, num_partitions=2, replication_factor=1, topic_configs=codec)])
    yield config
    admin.delete_topics([config.requests_topic])
    admin.close()


@pytest.mark.integration
def test_requests_arrive_in_kafka_as_they_were_sent(kafka_config: KafkaConfig) -> None:
    sent: list[Request] = []
    config = WorkloadConfig(requests=50, seed=4, phases=PhasesConfig(base_interval_ms=20.0))
    with connected(kafka_config) as producer:
        generator = KafkaLoadGenerator(producer, kafka_config.requests_topic, make_workload(config), SystemClock())
        report = generator.run(on_sent=sent.append)
    assert (report.sent, report.acknowledged, report.errors) == (50, 50, 0)

    consumer = KafkaConsumer(
        kafka_config.requests_topic,
        bootstrap_servers=kafka_config.brokers,
        auto_offset_reset="earliest",
        consumer_timeout_ms=20_000,
    )
    records = list(itertools.islice(consumer, 50))
    consumer.close()
    received = [Request.from_json(record.value) for record in records]
    assert sorted(received, key=lambda request: request.request_id) == sent
    assert all(record.key.decode() == request.session_id for record, request in zip(records, received, strict=True))
    for partition in (0, 1):
        of_partition = [record.value for record in records if record.partition == partition]
        ids = [Request.from_json(value).request_id for value in of_partition]
        assert ids == sorted(ids)


@pytest.mark.integration
def test_the_command_sends_and_reports(
    kafka_config: KafkaConfig, run_workloads: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    where = ("--brokers", kafka_config.brokers, "--topic-prefix", kafka_config.topic_prefix)
    finished = run_workloads(*where, "--requests", "30", "--backlog")
    assert (finished.returncode, finished.stderr) == (0, "")
    report = dict(line.split(":", 1) for line in finished.stdout.splitlines())
    assert [report[name].strip() for name in ("requests sent", "acknowledged", "errors")] == ["30", "30", "0"]
    assert run_workloads(*where, "--requests", "30", "--backlog", "--run", "two").returncode == 0
    consumer = KafkaConsumer(
        kafka_config.requests_topic,
        bootstrap_servers=kafka_config.brokers,
        auto_offset_reset="earliest",
        consumer_timeout_ms=20_000,
    )
    ids = {Request.from_json(record.value).request_id for record in itertools.islice(consumer, 60)}
    consumer.close()
    assert len(ids) == 60
    assert sum(name.endswith("-two") for name in ids) == 30

    finished = run_workloads(*where[:2], "--topic-prefix", "no-such")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith("error: --topic-prefix: ")
    assert finished.stderr.count("\n") == 1


@pytest.mark.integration
def test_a_topic_that_does_not_exist_is_refused_and_not_made(kafka_config: KafkaConfig) -> None:
    missing = kafka_config.model_copy(update={"topic_prefix": kafka_config.topic_prefix + "-none"})
    for _ in range(2):
        with pytest.raises(UserError, match=rf"--topic-prefix: .* has no topic {missing.requests_topic}"):
            connect(missing)

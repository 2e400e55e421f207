"""The production job on the real Flink, Kafka and Redis: continuous batching loses nothing and does not change answers.

If a request must be in flight for a while, the device is simulated; otherwise the model is real.
"""

import os
import re
import signal
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import pytest
from kafka import KafkaProducer
from prometheus_client.parser import text_string_to_metric_families

from core.clock import SystemClock
from core.default_slot import default_slot
from core.records import FinishReason, Request
from experiments.flink_job import FlinkJob
from inference_service.completion import Completion
from inference_service.config import EngineConfig
from inference_service.continuous_engine import ContinuousEngine
from inference_service.device_profile import DeviceProfile
from inference_service.transformers_engine import load_checked_model
from local_stack import LocalStack, StackConfig
from operators.config import JobConfig
from pipelines.connectors import ensure_topics
from tests.pipelines.job_run import (
    ROOT,
    Run,
    ids,
    listening_on,
    processes_of,
    slot_process,
)

pytestmark = pytest.mark.integration
JOB = ROOT / "pipelines" / "inference.py"
STEP_MS = 40.0


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a device on which every step takes `STEP_MS`."""
    path = tmp_path_factory.mktemp("profile") / "slow.json"
    overheads = {"prefill_overhead_ms": 1.0, "decode_overhead_ms": STEP_MS}
    path.write_text(DeviceProfile.instant().model_copy(update=overheads).model_dump_json())
    return ["--engine", "simulated", "--profile", str(path), "--no-cache"]


def one_by_one(model: Path, requests: Iterable[Request]) -> dict[str, tuple[int, ...]]:
    """The engine's answer to each request alone, without a cache."""
    config = EngineConfig(model=str(model), device="cpu", max_model_len=128, max_running=1)
    engine = ContinuousEngine(load_checked_model(config), config, None, 8, SystemClock())
    found = {}
    for request in requests:
        (done,) = engine.run([request])
        assert isinstance(done, Completion)
        found[request.request_id] = done.token_ids
    return found


def send_aborted(run: Run, producer: KafkaProducer, count: int, start: int) -> None:
    producer.begin_transaction()
    run.send(count, start=start, by=producer)
    producer.abort_transaction()


def tasks(job: FlinkJob, inputs: int) -> list[str]:
    """The operators of each task of the job that has at least this number of inputs."""
    nodes = job.cluster.get(f"/jobs/{job.job_id}/plan")["plan"]["nodes"]
    return [node["description"] for node in nodes if len(node.get("inputs", [])) >= inputs]


def test_a_bounded_run_answers_everything_as_the_engine_alone_would(run: Run, model: Path) -> None:
    """Requests and answers are compressed with each codec of Kafka, and some requests come in aborted transactions."""
    parallelism = 3
    ensure_topics(JobConfig(parallelism=parallelism, kafka=run.kafka))
    for topic, codec in zip(run.kafka.topics[1:], ("zstd", "lz4", "snappy"), strict=True):
        run.compress(topic, codec)
    with closing(run.producer(transactional_id=run.kafka.topic_prefix)) as transactional:
        transactional.init_transactions()
        send_aborted(run, transactional, 3, start=0)
        # None of them counts as a copy of an aborted one.
        run.send(10, max_new_tokens=12)
        for start, codec in zip((10, 20, 30, 40), ("gzip", "snappy", "lz4", "zstd"), strict=True):
            with closing(run.producer(compression_type=codec)) as compressing:
                run.send(10, start=start, max_new_tokens=12, by=compressing)
        send_aborted(run, transactional, 3, start=60)
    run.send(1, start=50, prompt="x" * 200)
    run.send(1, start=51, model="another")
    run.send(1, start=52, created_at_ms=1.0, deadline_ms=5.0)

    run.submit("--parallelism", str(parallelism), "--max-in-flight", "6", "--step-prefill-tokens", "16", "--bounded")
    run.settle()
    assert run.job.state() == "FINISHED"
    assert run.job.failures() == []
    assert sorted(ready["slot"] for ready in run.ready) == list(range(parallelism))
    # If two streams of one source meet again, barriers that overtake records on only one of them can deadlock.
    (meeting,) = tasks(run.job, inputs=2)
    assert "decode" in meeting
    assert "inference" not in meeting
    # A line that ends the job does so before the next checkpoint: it leaves no task.
    for name in ("decode", "inference"):
        (task,) = [task for task in tasks(run.job, inputs=0) if f"user-errors-of-{name}" in task]
        assert re.search(rf"(?<!-of-){name}", task)
    assert run.answered() == sorted([*ids(50), "r52"])
    assert sorted(str(letter.request_id) for letter in run.letters) == ["r50", "r51"]
    answers = {answer.request_id: answer for answer in run.responses}
    assert (answers["r52"].finish_reason, answers["r52"].output_tokens) == (FinishReason.DEADLINE, 0)
    for session in range(7):
        home = default_slot(f"s{session}", parallelism)
        assert {answer.slot for answer in run.responses if answer.session_id == f"s{session}"} <= {home}
    wanted = one_by_one(model, [request for request in run.sent if request.request_id in ids(50)])
    assert {name: answers[name].token_ids for name in ids(50)} == wanted
    # They ran together, within the cap.
    assert max(answer.decode_rows or 0 for answer in run.responses) > 1.5
    assert max(answer.batch_size for answer in run.responses) <= 6


def test_a_model_that_is_refused_ends_the_job_with_its_line(run: Run, model: Path, tmp_path: Path) -> None:
    refused = tmp_path / "no-tokenizer"
    refused.mkdir()
    for file in model.iterdir():
        if not file.name.startswith(("tokenizer", "special_tokens")):
            (refused / file.name).symlink_to(file)
    run.submit("--parallelism", "2", "--model", str(refused))
    assert run.job.wait_ended(240) == "FAILED"
    (failure,) = run.job.failures()
    assert failure.endswith(f"model: there is no tokenizer in {str(refused)!r}; save one beside the weights")


def test_an_answer_does_not_wait_for_a_longer_one_and_a_drain_answers_both(
    run: Run, stack: LocalStack, slow: list[str]
) -> None:
    run.submit("--parallelism", "2", *slow)
    run.read_until(lambda r: len(r.ready) == 2)
    running = processes_of(stack)
    assert sum("operators.slots.server" in process.cmdline() for process in running) == 2
    # The TaskManager's JVM itself takes connections of Python workers at any address: Beam binds these ports.
    assert listening_on(process for process in running if process.name() != "java") <= {"127.0.0.1"}
    assert {str(ready["device"]) for ready in run.ready} == {"simulated:0", "simulated:1"}
    assert {ready["engine"] for ready in run.ready} == {"simulated"}
    long, short = _neighbours(2)
    run.send(1, start=0, session_id=long, max_new_tokens=100)
    run.send(1, start=1, session_id=short, max_new_tokens=2)
    run.read_until(lambda r: len(r.responses) == 1)
    assert run.answered() == ["r1"]
    run.job.stop(None, 240)
    run.settle()
    assert run.answered() == ["r0", "r1"]
    assert {answer.output_tokens for answer in run.responses} == {100, 2}


def test_a_slot_process_that_is_killed_under_load_costs_no_request_and_no_restart_of_the_job(
    run: Run, stack: LocalStack, slow: list[str], tmp_path: Path
) -> None:
    port = StackConfig.on_free_ports(tmp_path).redis_port
    run.submit("--parallelism", "1", "--max-running", "4", "--metrics-port", str(port), *slow)
    run.read_until(lambda r: len(r.ready) == 1)
    run.send(16, max_new_tokens=12)
    run.send_raw(b"no request")
    run.read_until(lambda r: len(r.responses) >= 4)
    os.kill(slot_process(stack), signal.SIGKILL)
    run.read_until(lambda r: len(r.responses) >= 16)
    figures = scraped(port)
    shown = gauges(run, "infertuner_slot_up", "infertuner_e2e_p95_milliseconds")
    run.job.stop(None, 240)
    run.settle()
    assert run.answered() == ids(16)
    assert [letter.stage for letter in run.letters] == ["decode"]
    assert run.job.failures() == []
    assert figures["infertuner_slot_restarts_total"] == figures["infertuner_slot_up"] == 1
    assert figures["infertuner_retried_requests_total"] <= 4
    assert (figures["infertuner_requests_total"], figures["infertuner_e2e_seconds_count"]) == (16, 16)
    assert figures["infertuner_dead_letters_total"] == 1
    assert figures["infertuner_output_tokens_total"] == 16 * 12
    assert shown["infertuner_slot_up"] == 1
    assert shown["infertuner_e2e_p95_milliseconds"] >= 12 * STEP_MS


def scraped(port: int) -> dict[str, float]:
    """A slot's metrics as Prometheus reads them, summed over the labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        read: defaultdict[str, float] = defaultdict(float)
        for sample in (sample for family in families for sample in family.samples):
            read[sample.name] += sample.value
        return dict(read)


def gauges(run: Run, *names: str) -> dict[str, float]:
    """The gauges that Flink shows, as soon as it shows any. Its values are some seconds old."""
    cluster, job = run.job.cluster, f"/jobs/{run.job.job_id}"
    (vertex,) = [one["id"] for one in cluster.get(job)["vertices"] if "inference" in one["name"]]
    deadline_s = time.monotonic() + 60
    while True:
        known = [one["id"] for one in cluster.get(f"{job}/vertices/{vertex}/metrics")]
        found = {name: one for one in known for name in names if one.endswith(f".{name}")}
        if len(found) == len(names):
            values = cluster.get(f"{job}/vertices/{vertex}/metrics?get={','.join(found.values())}")
            by_id = {one["id"]: float(one["value"]) for one in values}
            if all(by_id.get(one) for one in found.values()):
                return {name: by_id[one] for name, one in found.items()}
        assert time.monotonic() < deadline_s, known
        time.sleep(0.5)


def test_new_sessions_go_around_an_overloaded_slot_and_old_ones_stay(run: Run, slow: list[str]) -> None:
    """All sessions have the default slot 0, which gets more load than it can serve."""
    run.submit("--parallelism", "2", "--max-running", "1", "--overload-ms", "300", *slow)
    run.read_until(lambda r: len(r.ready) == 2)
    of_slot_0 = [name for name in (f"u{number}" for number in range(200)) if default_slot(name, 2) == 0]
    for number in range(40):
        run.send(1, start=number, session_id=of_slot_0[number // 2], max_new_tokens=5)
        time.sleep(0.05)  # the load's own pace: a session's two requests come apart, and loads are told in between
    run.read_until(lambda r: len(r.responses) == 40)
    assert run.answered() == ids(40)
    slots: dict[str, set[int]] = {}
    for answer in run.responses:
        slots.setdefault(answer.session_id, set()).add(answer.slot)
    assert all(len(found) == 1 for found in slots.values())
    counts = [sum(found == {slot} for found in slots.values()) for slot in range(2)]
    assert min(counts) >= 4


def _neighbours(slots: int) -> tuple[str, str]:
    """Two sessions with the same default slot."""
    first = "n0"
    return first, next(
        f"n{number}" for number in range(1, 100) if default_slot(f"n{number}", slots) == default_slot(first, slots)
    )

"""The delivery guarantees on the real Flink and Kafka: copies, failures, restarts and rescaling.

A simulated device keeps requests in flight for a while. Only the tests trigger checkpoints, so they know what came
after the last one.
"""

import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from core.records import Response
from inference_service.device_profile import DeviceProfile
from local_stack import LocalStack
from operators.config import JobConfig
from operators.delivery.kafka_journal import KafkaJournal
from pipelines.connectors import ensure_topics
from tests.pipelines.job_run import ROOT, Run, ids, stop_with_savepoint, take_checkpoint, worker

pytestmark = pytest.mark.integration
JOB = ROOT / "pipelines" / "inference.py"
STEP_MS = 40.0
SHORT, LONG = 15, 200
"""Tokens of a short answer, under a second, and of a long one, some seconds."""
OPTIONS = ("--checkpoint-interval-ms", "600000", "--max-running", "16")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a device on which every step takes `STEP_MS`."""
    path = tmp_path_factory.mktemp("profile") / "slow.json"
    overheads = {"prefill_overhead_ms": 1.0, "decode_overhead_ms": STEP_MS}
    path.write_text(DeviceProfile.instant().model_copy(update=overheads).model_dump_json())
    return ["--engine", "simulated", "--profile", str(path), "--no-cache", "--max-model-len", "512"]


@pytest.fixture
def journal(run: Run) -> Iterator[KafkaJournal]:
    ensure_topics(JobConfig(parallelism=1, kafka=run.kafka))
    with closing(KafkaJournal(run.kafka)) as made:
        yield made


def test_a_killed_worker_and_a_start_without_state_ask_for_nothing_twice(
    run: Run, stack: LocalStack, slow: list[str]
) -> None:
    """Requests answered after the last checkpoint are in flight in its state, or are read again from Kafka."""
    run.submit("--parallelism", "1", *OPTIONS, *slow)
    run.read_until(lambda r: len(r.ready) == 1)
    run.send(4, start=0, max_new_tokens=SHORT)
    run.send(6, start=4, max_new_tokens=LONG)
    run.send(2, start=3)
    take_checkpoint(run)
    run.send(4, start=10, max_new_tokens=SHORT)
    run.send(3, start=9)
    run.read_until(lambda r: len(r.responses) >= 8)
    os.kill(worker(stack), signal.SIGKILL)
    run.read_until(lambda r: len(set(r.answered())) == 14)

    run.send(2, start=14, max_new_tokens=SHORT)
    run.send(4, start=16, max_new_tokens=LONG)
    run.read_until(lambda r: len(set(r.answered())) == 16)
    # It moves the group's offset beyond the requests in flight.
    take_checkpoint(run)
    run.job.cancel()
    run.submit("--parallelism", "1", *OPTIONS, *slow)
    run.send(1, start=17)
    run.read_until(lambda r: len(set(r.answered())) == 20)
    run.job.stop(None, 240)
    run.settle()
    assert run.answered() == ids(20)
    assert engines(run.responses) == 3
    assert run.letters == []


def test_exactly_once_writes_again_what_a_failure_took_back_and_does_not_ask_for_it(
    run: Run, stack: LocalStack, slow: list[str], journal: KafkaJournal
) -> None:
    run.submit("--parallelism", "1", "--delivery", "exactly-once", *OPTIONS, *slow)
    until(lambda: recorded(journal, run.kafka.ready_topic))
    run.send(4, start=0, max_new_tokens=LONG // 2)
    run.send(6, start=4, max_new_tokens=LONG)
    take_checkpoint(run)
    run.send(1, start=14, model="another")
    run.send(4, start=10, max_new_tokens=SHORT)
    # The last short answer came after the checkpoint, and the dead letter before it.
    until(lambda: {"r0", "r13"} <= recorded(journal, run.kafka.responses_topic).keys())
    topics = (run.kafka.responses_topic, run.kafka.dead_letters_topic)
    before = [recorded(journal, topic) for topic in topics]
    committed = [recorded(journal, topic, committed=True) for topic in topics]
    os.kill(worker(stack), signal.SIGKILL)
    until(lambda: len(recorded(journal, run.kafka.responses_topic)) == 14)
    run.job.stop(None, 240)
    visible = [recorded(journal, topic, committed=True) for topic in topics]
    assert {name: len(values) for name, values in visible[0].items()} == dict.fromkeys(ids(14), 1)
    assert {name: len(values) for name, values in visible[1].items()} == {"r14": 1}
    # The same bytes, although the failure aborted their transactions, so that no other reader has seen them.
    for topic, was, seen, found in zip(topics, before, committed, visible, strict=True):
        taken_back = was.keys() - seen.keys()
        assert taken_back
        everything = recorded(journal, topic)
        assert all(everything[name] == [found[name][0]] * 2 for name in taken_back)
    responses = [Response.model_validate_json(value) for values in visible[0].values() for value in values]
    assert engines(responses) == 2


def test_what_is_in_flight_goes_along_to_another_parallelism(run: Run, slow: list[str], tmp_path: Path) -> None:
    run.submit("--parallelism", "2", *OPTIONS, *slow)
    run.read_until(lambda r: len(r.ready) == 2)
    run.send(14, max_new_tokens=LONG)
    take_checkpoint(run)
    savepoint = stop_with_savepoint(run, tmp_path)
    run.read_until(lambda r: True)
    left = set(ids(14)) - set(run.answered())
    run.submit("--parallelism", "3", *OPTIONS, *slow, savepoint=savepoint)
    run.send(2, start=13)
    run.read_until(lambda r: len(set(r.answered())) == 15)
    run.read_until(lambda r: len(r.ready) == 5)
    savepoint = stop_with_savepoint(run, tmp_path, drain=True)
    run.submit("--parallelism", "1", *OPTIONS, *slow, savepoint=savepoint)
    run.send(2, start=14)
    run.read_until(lambda r: len(set(r.answered())) == 16)
    run.job.cancel()
    run.settle()
    assert run.answered() == ids(16)
    assert left
    assert engines(run.responses) >= 3


def engines(responses: list[Response]) -> int:
    """Number of slot processes that have answered; fails if an engine gave more answers than are here.

    A process numbers the answers of its engine from 0: `SLOT-MILLISECONDS-NUMBER`.
    """
    known = sorted(tuple(map(int, response.batch_id.split("-"))) for response in responses)
    began = 0
    for before, (slot, _, number) in zip([(-1, 0, 0), *known], known, strict=False):
        if number == 0:
            began += 1
        else:
            assert (slot, number) == (before[0], before[2] + 1), known
    return began


def recorded(journal: KafkaJournal, topic: str, *, committed: bool = False) -> dict[str, list[bytes]]:
    """The values under each key. Without `committed`, those of aborted and open transactions are included."""
    found: dict[str, list[bytes]] = defaultdict(list)
    spans = {place: range(end) for place, end in journal.ends([topic], decided=committed).items()}
    for record in journal.read(spans, committed=committed):
        found[record.key.decode()].append(record.value)
    return dict(found)


def until(condition: Callable[[], object], timeout_s: float = 240.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)

"""A slot in a process of its own answers as it would in this one, and neither process outlives the other."""

import fcntl
import logging
import os
import pickle
import signal
import subprocess
import sys
import termios
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from transformers import Qwen2Config

from cache.config import CacheConfig
from core.clock import SystemClock
from core.errors import UserError
from inference_service.config import EngineConfig
from operators.config import BatchingConfig, JobConfig, SupervisionConfig
from operators.envelope import Answer, Envelope, MicroBatch, Ready
from operators.slots import process as slot_process
from operators.slots.process import END_TIMEOUT_S, Began, Heartbeat, SlotDiedError, SlotMessage, SlotProcess
from operators.slots.slot import InferenceSlot
from tests.inference_service.engine_helpers import LAYERS_OF_TWO, save_tiny
from tests.operators.answers import letter_of, response_of
from tests.operators.test_slot import envelope

ROOT = Path(__file__).parents[2]
WAIT_S = 60.0
"""Time limit of waits, which only a failure reaches."""
LONG = 30_000
"""Number of tokens of an answer that takes most of a minute."""
WORKER = """
import pickle, sys
from operators.slots import process

process.SERVER, config, requests, awaited = pickle.load(sys.stdin.buffer)
made = process.SlotProcess(config, 0)
for request in requests:
    made.send(request)
while not isinstance(made.receive(60.0), awaited):
    pass
print(made._process.pid, flush=True)
while True:
    made.receive(60.0)
"""


class AwaitedProcess(SlotProcess):
    """A ready process. A test waits for one kind of message at a time."""

    def __init__(self, config: JobConfig) -> None:
        super().__init__(config, 0)
        try:
            self.ready: Ready = self.next(Ready)
        except BaseException:
            self.close()
            raise

    def until(self, kind: type) -> list[SlotMessage]:
        """All messages up to the first one of this kind."""
        said: list[SlotMessage] = []
        deadline_s = time.monotonic() + WAIT_S
        while not said or not isinstance(said[-1], kind):
            assert time.monotonic() < deadline_s, said
            said += [one for one in [self.receive(1.0)] if one is not None]
        return said

    def next(self, kind: type):  # type: ignore[no-untyped-def]
        return self.until(kind)[-1]

    def answers(self) -> list[Answer]:
        answers: list[Answer] = self.next(list)
        return answers

    def answer(self, batch: Sequence[Envelope]) -> list[Answer]:
        self.send(MicroBatch(batch))
        return self.answers()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    """The configuration of a job whose model never ends an answer by itself."""
    layers = LAYERS_OF_TWO | {"max_position_embeddings": 1 << 15, "eos_token_id": None}
    path = save_tiny(tmp_path_factory.mktemp("process") / "tiny-qwen2", Qwen2Config(**layers))
    return JobConfig(
        parallelism=1,
        engine=EngineConfig(model=str(path), device="cpu", threads=1, max_running=4, max_model_len=1 << 15),
        cache=CacheConfig(chunk_tokens=8),
        batching=BatchingConfig(batch_size=4),
    )


@pytest.fixture(scope="module")
def slot(config: JobConfig) -> InferenceSlot:
    return InferenceSlot(config, 0, SystemClock())


@pytest.fixture(scope="module")
def process(config: JobConfig) -> Iterator[AwaitedProcess]:
    made = AwaitedProcess(config)
    yield made
    made.close()
    assert made._process.returncode == 0


Start = Callable[[JobConfig], AwaitedProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes, and closes them at the end. The test may end them earlier."""
    made: list[AwaitedProcess] = []

    def one(config: JobConfig) -> AwaitedProcess:
        made.append(AwaitedProcess(config))
        return made[-1]

    yield one
    for process in made:
        process.close()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> JobConfig:
    """The configuration of a job with a stand-in for the engine."""
    monkeypatch.setattr(slot_process, "SERVER", "tests.operators.stand_in_server")
    return JobConfig()


def prompts(*max_new_tokens: int) -> list[Envelope]:
    return [
        envelope(number, prompt=f"prompt {number} of some tokens", max_new_tokens=most)
        for number, most in enumerate(max_new_tokens)
    ]


def tokens(answers: Iterable[Answer]) -> dict[int, tuple[int, ...]]:
    """Token ids of the answers, by the offset of the request."""
    return {answer.position.offset: response_of(answer).token_ids for answer in answers}


def has_ended(process: psutil.Process) -> bool:
    """True if the process has ended. It may remain a zombie if no process adopts orphans."""
    with suppress(psutil.NoSuchProcess):
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


def test_requests_sent_one_by_one_come_back_each_by_itself(process: AwaitedProcess, slot: InferenceSlot) -> None:
    requests = prompts(30, 10, 20)
    for request in requests:
        process.send(request)
    answers: list[Answer] = []
    while len(answers) < len(requests):
        answers += process.answers()
    assert tokens(answers) == tokens(slot.answer(requests))
    assert [len(tokens(answers)[number]) for number in range(3)] == [30, 10, 20]
    assert len({response_of(answer).batch_id for answer in answers}) == len(requests)
    for request in requests:
        process.send(request)
        (answer,) = process.answers()
        assert tokens([answer]).items() <= tokens(answers).items()
        assert response_of(answer).batch_size == 1


def test_a_group_comes_back_whole(process: AwaitedProcess, slot: InferenceSlot) -> None:
    requests = prompts(3, 12, 1, 7)
    answers = process.answer(requests)
    assert tokens(answers) == tokens(slot.answer(requests))
    responses = [response_of(answer) for answer in answers]
    assert {one.batch_size for one in responses} == {len(requests)}
    assert len({one.batch_id for one in responses}) == 1
    assert len({one.completed_at_ms for one in responses}) == 1


def test_what_the_model_cannot_answer_comes_back_as_a_dead_letter(process: AwaitedProcess) -> None:
    bad = envelope(4, model="another")
    process.send(bad)
    (answer,) = process.answers()
    assert answer.position == bad.position
    assert "'another'" in letter_of(answer).reason
    assert (letter_of(answer).raw, letter_of(answer).offset) == (bad.raw, 4)


def test_a_group_is_answered_though_one_of_it_cannot_be(process: AwaitedProcess) -> None:
    answers = process.answer([envelope(0), envelope(1, prompt=None, prompt_token_ids=[10**6]), envelope(2)])
    by_place = {answer.position.offset: answer for answer in answers}
    assert sorted(by_place) == [0, 1, 2]
    assert "vocabulary" in letter_of(by_place[1]).reason
    assert response_of(by_place[0]).token_ids == response_of(by_place[2]).token_ids


def test_the_process_says_what_serves(process: AwaitedProcess, slot: InferenceSlot) -> None:
    assert process.ready.model_copy(update={"load_s": 0.0}) == slot.ready.model_copy(update={"load_s": 0.0})
    assert process._process.pid != os.getpid()


def test_what_the_process_logs_is_in_this_ones_log_with_its_level_and_name_once(
    stand_in: JobConfig, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    process = start(stand_in)
    process.send(envelope(9, prompt="log"))
    (answer,) = process.answers()
    assert letter_of(answer).reason == "logged"
    (record,) = (one for one in caplog.records if one.levelno == logging.ERROR)
    assert (record.name, record.process) == ("stand-in", process._process.pid)
    first, *rest = record.getMessage().splitlines()
    assert first == "request 'r9' could not be tokenized"
    assert rest[0].startswith("Traceback")
    assert rest[-1] == "TypeError: no prompt"


def test_the_process_logs_from_this_ones_level_on(
    stand_in: JobConfig, start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for level, expected in ((logging.INFO, ["stand-in"]), (logging.WARNING, [])):
        caplog.clear()
        monkeypatch.setattr(logging.getLogger(), "level", level)
        start(stand_in)
        assert [record.name for record in caplog.records] == expected


def test_a_model_that_cannot_be_served_is_told_in_a_line(config: JobConfig, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    engine = config.engine.model_copy(update={"model": str(tmp_path)})
    before = psutil.Process().children()
    with pytest.raises(UserError, match=r"^model: cannot load ") as raised:
        AwaitedProcess(config.model_copy(update={"engine": engine}))
    assert "\n" not in str(raised.value)
    assert set(psutil.Process().children()) <= set(before)


def test_a_slot_that_fails_to_load_is_told_with_its_traceback(stand_in: JobConfig) -> None:
    before = psutil.Process().children()
    with pytest.raises(SlotDiedError, match="disk lost") as raised:
        AwaitedProcess(stand_in.model_copy(update={"engine": EngineConfig(model="broken")}))
    assert "Traceback" in str(raised.value)
    assert "in __init__" in str(raised.value)
    assert set(psutil.Process().children()) <= set(before)


@pytest.mark.parametrize("error", ["RuntimeError", "OSError", "EOFError", "ConnectionResetError"])
def test_an_engine_that_raises_is_told_with_its_traceback(stand_in: JobConfig, start: Start, error: str) -> None:
    process = start(stand_in)
    process.send(envelope(1, prompt=f"raise {error}"))
    with pytest.raises(SlotDiedError, match=f"{error}: device lost") as raised:
        process.answers()
    assert raised.value.how == f"failed: {error}: device lost"
    assert "Traceback" in str(raised.value)
    assert "in step" in str(raised.value)
    with pytest.raises(SlotDiedError, match="with status 1"):
        process.answers()


@pytest.mark.parametrize("grouped", [False, True])
def test_a_killed_process_is_told_by_its_signal(stand_in: JobConfig, start: Start, grouped: bool) -> None:
    process = start(stand_in)
    poison = envelope(1, prompt="kill")
    process.send(MicroBatch([poison]) if grouped else poison)
    for _ in range(2):
        with pytest.raises(SlotDiedError, match="was ended by SIGKILL"):
            process.answers()
        # `send` does not raise. Only `receive` does.
        process.send(envelope(2))


@pytest.mark.parametrize("grouped", [False, True])
def test_the_process_says_before_it_begins_with_a_request(process: AwaitedProcess, grouped: bool) -> None:
    requests = prompts(3, 2)
    for order in [MicroBatch(requests)] if grouped else requests:
        process.send(order)
    began: list[Envelope] = []
    answered = 0
    while answered < len(requests):
        said = process.until(list)
        positions = [position for one in said if isinstance(one, Began) for position in one.positions]
        began += [one for one in requests if one.position in positions]
        answered += len(said[-1])  # type: ignore[arg-type]
    assert sorted(began, key=lambda one: one.position.offset) == requests


@pytest.mark.parametrize("grouped", [False, True])
def test_the_process_says_that_it_lives_while_it_works(stand_in: JobConfig, start: Start, grouped: bool) -> None:
    process = start(stand_in)
    for _ in range(2):
        assert not any(isinstance(said, list) for said in process.until(Heartbeat))
    long = envelope(1, max_new_tokens=LONG)
    process.send(MicroBatch([long]) if grouped else long)
    process.next(Began)
    for _ in range(3):
        assert [type(said) for said in process.until(Heartbeat)] == [Heartbeat]
    process.kill()


def test_sending_does_not_wait_for_a_process_that_stands_still(stand_in: JobConfig, start: Start) -> None:
    process = start(stand_in)
    os.kill(process._process.pid, signal.SIGSTOP)
    for number in range(20):
        process.send(envelope(number, prompt="x" * 500_000))
    while process.receive(0.1) is not None:
        pass
    process.kill()
    with pytest.raises(SlotDiedError, match="was ended by SIGKILL"):
        process.answers()


def test_a_process_that_stops_in_the_midst_of_a_word_is_not_waited_for(
    stand_in: JobConfig, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = SupervisionConfig(engine_timeout_s=0.5)
    process = start(stand_in.model_copy(update={"supervision": limits}))
    # The reply is larger than the buffer of the socket.
    process.send(envelope(1, prompt="refuse" + "x" * 500_000))
    deadline_s = time.monotonic() + WAIT_S
    while unread_bytes(process) < 50_000:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    os.kill(process._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(slot_process, "END_TIMEOUT_S", 0.1)
    with pytest.raises(SlotDiedError, match="does not answer any more"):
        process.answers()


def unread_bytes(process: SlotProcess) -> int:
    """Number of bytes from the process that have not been read."""
    found = array("i", [0])
    fcntl.ioctl(process._socket, termios.FIONREAD, found)
    return found[0]


def test_ending_does_not_wait_for_a_long_answer(config: JobConfig, start: Start) -> None:
    process = start(config)
    process.send(envelope(1, max_new_tokens=LONG))
    process.send(envelope(2, max_new_tokens=1))
    # The short one has left, so the long one runs.
    assert [answer.position.offset for answer in process.answers()] == [2]
    with ThreadPoolExecutor(1) as threads:
        receiving = threads.submit(process.answers)
        process.end()
        with pytest.raises(SlotDiedError, match="was ended with status 0"):
            receiving.result(WAIT_S)
    # It ended by itself. Otherwise it would have been killed.
    assert process._process.returncode == 0


def test_a_process_that_does_not_end_in_time_is_killed(
    stand_in: JobConfig, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start(stand_in)
    process.send(envelope(1, prompt="stall at once"))
    process.next(Began)
    monkeypatch.setattr(slot_process, "END_TIMEOUT_S", 0.1)
    process.end()
    assert process._process.returncode == -signal.SIGKILL
    with pytest.raises(SlotDiedError, match="was ended by SIGKILL"):
        process.answers()


@pytest.mark.parametrize(
    ("server", "requests", "awaited"),
    [
        (slot_process.SERVER, [envelope(1, max_new_tokens=LONG), envelope(2, max_new_tokens=1)], list),
        ("tests.operators.stand_in_server", [envelope(1, prompt="stall at once")], Began),
    ],
    ids=["serves", "hangs"],
)
def test_the_process_ends_when_its_worker_is_killed(
    config: JobConfig, server: str, requests: list[Envelope], awaited: type
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WORKER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            worker.stdin.write(pickle.dumps((server, config, requests, awaited)))
            worker.stdin.close()
            process = psutil.Process(int(worker.stdout.readline()))
            assert process.ppid() == worker.pid
        finally:
            worker.kill()
    try:
        deadline_s = time.monotonic() + END_TIMEOUT_S
        while not has_ended(process):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
    finally:
        with suppress(psutil.NoSuchProcess):
            process.kill()

"""A slot survives the death of its processes. Requests that kill them are found, and all others are answered.

The processes are real, and really killed or stopped; only their engine is a stand-in.
"""

import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from queue import SimpleQueue

import psutil
import pytest

from core.clock import Clock, ManualClock, SystemClock
from core.errors import UserError
from core.records import DeadLetter, Response
from inference_service.config import EngineConfig
from operators.config import Batching, BatchingConfig, JobConfig, SupervisionConfig
from operators.envelope import Answer, Envelope, MicroBatch, Ready
from operators.metrics.slot_metrics import SlotMetrics
from operators.slots import process as slot_process
from operators.slots import supervisor
from operators.slots.process import Began, Heartbeat, SlotDiedError, SlotMessage
from operators.slots.retry_tracker import Retry
from operators.slots.supervisor import Process, Supervisor, backoff_s
from tests.operators.answers import response_of
from tests.operators.test_pump import letter
from tests.operators.test_slot import envelope
from tests.operators.test_slot_server import STATS

WAIT_S = 60.0
"""Time limit of waits, which only a failure reaches."""
Start = Callable[..., Supervisor]
MODES = [Batching.CONTINUOUS, Batching.MICRO]


def config(batching: Batching = Batching.CONTINUOUS, model: str = "default", **limits: float) -> JobConfig:
    made = JobConfig(
        parallelism=1, engine=EngineConfig(model=model, max_running=4), batching=BatchingConfig(batching=batching)
    )
    # Lower than what users may configure, so that the test needs fewer deaths.
    return made.model_copy(update={"supervision": SupervisionConfig().model_copy(update=limits)})


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_process, "SERVER", "tests.operators.stand_in_server")
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_S", 0.01)


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """The processes of slots. Others, such as the cluster of other tests, do not count."""
    before = set(psutil.Process().children())
    yield
    assert set(psutil.Process().children()) <= before


@pytest.fixture
def start() -> Iterator[Start]:
    made: list[Supervisor] = []

    def one(job: JobConfig, clock: Clock | None = None, **how: object) -> Supervisor:
        clock = clock or SystemClock()
        how.setdefault("metrics", SlotMetrics(0, clock))
        made.append(Supervisor(job, 0, clock, **how))
        return made[-1]

    yield one
    for slot in made:
        slot.close()
        assert not slot._thread.is_alive()


class Outcomes:
    """Outcomes of requests. Each request must have one."""

    def __init__(self) -> None:
        self.responses: dict[int, Response] = {}
        self.letters: dict[int, DeadLetter] = {}
        self.retries: Counter[int] = Counter()

    def add(self, came: Sequence[Answer | Retry]) -> None:
        for one in came:
            if isinstance(one, Retry):
                number = one.envelope.position.offset
                self.retries[number] += 1
                assert one.envelope.attempts == self.retries[number]
                continue
            number = one.position.offset
            assert number not in self.responses.keys() | self.letters.keys()
            if isinstance(one.record, DeadLetter):
                self.letters[number] = one.record
            else:
                self.responses[number] = response_of(one)

    @property
    def processes(self) -> int:
        """Ids of the processes that have answered."""
        return len({response.text for response in self.responses.values()})


def ask(slot: Supervisor, requests: Sequence[Envelope], batching: Batching) -> Outcomes:
    found = Outcomes()
    if batching is Batching.MICRO:
        found.add(slot.answer(requests))
        return found
    for request in requests:
        slot.send(request)
    while len(found.responses) + len(found.letters) < len(requests):
        found.add(slot.receive())
    return found


def mixed(poison: str, at: int = 2, count: int = 6, steps: int = 30) -> list[Envelope]:
    """Requests that run together for a while, one of which kills its process."""
    return [
        envelope(number, prompt=poison if number == at else "fine", max_new_tokens=steps) for number in range(count)
    ]


def pid(slot: Supervisor) -> int:
    process = slot._process
    assert isinstance(process, slot_process.SlotProcess)
    return process._process.pid


HUNG = "hung: it sent nothing for 2 s"


@pytest.mark.parametrize(
    ("poison", "how", "batching"),
    [
        ("kill", "was ended by SIGKILL", Batching.CONTINUOUS),
        ("kill", "was ended by SIGKILL", Batching.MICRO),
        ("stop", HUNG, Batching.CONTINUOUS),
        ("stall", HUNG, Batching.MICRO),
        ("raise RuntimeError", "failed: RuntimeError: device lost", Batching.CONTINUOUS),
        ("tokenize", "was ended by SIGKILL", Batching.CONTINUOUS),
    ],
    ids=lambda value: str(value).split(":")[0],
)
def test_only_who_the_process_dies_of_is_not_answered(start: Start, poison: str, how: str, batching: Batching) -> None:
    slot = start(config(batching, engine_timeout_s=2.0))
    requests = mixed(poison)
    found = ask(slot, requests, batching)
    assert sorted(found.responses) == [0, 1, 3, 4, 5]
    (number, refused), *_ = found.letters.items()
    assert number == 2
    assert refused.reason == f"the slot's process died 2 times while it worked on this request: {how}"
    assert (refused.stage, refused.raw, refused.request_id) == ("inference", requests[2].raw, "r2")
    assert max(found.retries.values(), default=1) == 1
    # The slot goes on answering.
    assert list(ask(slot, [envelope(9)], batching).responses) == [9]


@pytest.mark.parametrize("batching", MODES)
def test_a_process_that_is_killed_from_outside_costs_no_request(start: Start, batching: Batching) -> None:
    slot = start(config(batching))
    first = pid(slot)
    killing = threading.Timer(0.2, os.kill, [first, signal.SIGKILL])
    killing.start()
    found = ask(slot, [envelope(number, max_new_tokens=150) for number in range(10)], batching)
    killing.join()
    assert sorted(found.responses) == list(range(10))
    assert found.letters == {}
    assert str(pid(slot)) in {response.text for response in found.responses.values()}
    assert pid(slot) != first


def test_deaths_are_counted_and_the_slot_is_down_meanwhile(start: Start) -> None:
    scripts = Scripts()
    metrics = SlotMetrics(0, scripts.clock)
    slot = start(config(slot_restarts=9), scripts.clock, metrics=metrics, start=scripts.start)
    read = partial(metrics.registry.get_sample_value, labels={"slot": "0"})
    assert read("infertuner_slot_up") == 1
    slot.send(envelope(1))
    slot.send(envelope(2))
    assert (read("infertuner_in_flight_requests"), read("infertuner_waiting_requests")) == (2, 2)
    (first,) = scripts.made
    first.says.put(Heartbeat(STATS))
    first.says.put(Began([envelope(1).position]))
    deadline_s = time.monotonic() + WAIT_S
    while read("infertuner_waiting_requests") == 2:
        assert time.monotonic() < deadline_s
    assert read("infertuner_passes_total") == STATS.engine.passes
    scripts.ready = False
    first.says.put(SlotDiedError("was ended by SIGKILL"))
    second = scripts.wait_for(2)
    assert [read(f"infertuner_{name}_total") for name in ("slot_restarts", "retried_requests")] == [1, 1]
    assert read("infertuner_slot_up") == 0
    assert read("infertuner_waiting_requests") == 2
    second.says.put(READY)
    while read("infertuner_slot_up") == 0:
        assert time.monotonic() < deadline_s


def test_what_is_asked_again_is_told_with_its_attempts(start: Start) -> None:
    slot = start(config(max_attempts=3))
    found = ask(slot, mixed("kill"), Batching.CONTINUOUS)
    assert found.retries[2] == 2
    assert set(found.retries.values()) <= {1, 2}
    assert "died 3 times" in found.letters[2].reason


def test_attempts_of_before_a_restart_of_the_job_count(start: Start) -> None:
    slot = start(config())
    plain = envelope(1, prompt="kill")
    tried = Envelope(plain.slot, plain.raw, plain.position, plain.decoded_at_ms, attempts=1)
    found = ask(slot, [tried, envelope(2)], Batching.CONTINUOUS)
    assert list(found.responses) == [2]
    assert "died 2 times" in found.letters[1].reason
    assert not found.retries


@pytest.mark.parametrize("batching", MODES)
def test_an_idle_process_that_dies_is_replaced_before_anybody_asks(start: Start, batching: Batching) -> None:
    slot = start(config(batching))
    first = pid(slot)
    os.kill(first, signal.SIGKILL)
    deadline_s = time.monotonic() + WAIT_S
    while slot._process is None or pid(slot) == first or not slot._serves:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert list(ask(slot, [envelope(1)], batching).responses) == [1]


def test_deaths_in_a_row_without_an_answer_are_told(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    slot = start(config(slot_restarts=2, max_attempts=9))
    slot.send(envelope(1, prompt="kill"))
    assert [type(one) for _ in range(2) for one in slot.receive()] == [Retry, Retry]
    with pytest.raises(SlotDiedError, match="was ended by SIGKILL; that was death 3 in a row without an answer"):
        slot.receive()
    with pytest.raises(SlotDiedError, match="death 3"):
        slot.receive()
    slot.send(envelope(2))
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert ["SIGKILL" in record.getMessage() for record in warnings] == [True, True]


def test_an_answer_ends_a_row_of_deaths(start: Start) -> None:
    slot = start(config(slot_restarts=1, max_attempts=1))
    for number in range(0, 6, 2):
        requests = [envelope(number, prompt="kill"), envelope(number + 1)]
        slot.send(requests[0])
        found = Outcomes()
        while not found.letters:
            found.add(slot.receive())
        slot.send(requests[1])
        while not found.responses:
            found.add(slot.receive())


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("broken", "failed: OSError: disk lost"),
        ("killed", "was ended by SIGKILL"),
        ("stalled", "hung: it sent nothing for 1 s"),
    ],
)
def test_a_slot_that_cannot_load_is_tried_again_and_then_told(model: str, told: str) -> None:
    limits = {"load_timeout_s": 1.0} if model == "stalled" else {}
    with pytest.raises(SlotDiedError, match=f"{told}; that was death 2 in a row"):
        Supervisor(config(model=model, slot_restarts=1, **limits), 0, SystemClock(), SlotMetrics(0, SystemClock()))


def test_what_the_user_gave_wrong_is_told_at_once() -> None:
    with pytest.raises(UserError, match="model: not this one"):
        Supervisor(config(model="refused"), 0, SystemClock(), SlotMetrics(0, SystemClock()))


def test_a_slot_ends_in_the_midst_of_work(start: Start) -> None:
    slot = start(config())
    slot.send(envelope(1, max_new_tokens=20_000))
    slot.end()
    with pytest.raises(SlotDiedError, match="was ended with status 0"):
        slot.receive()
    with pytest.raises(SlotDiedError):
        slot.receive()


READY = Ready(slot=0, device="cpu", engine="e", model="m", dtype="float32", threads=1, chunk_bytes=1, load_s=0.0)


class Script(Process):
    """A process that sends the messages of a test. A wait without a message lasts as long as it may."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock
        self.says: SimpleQueue[SlotMessage | Exception] = SimpleQueue()
        self.sent: list[Envelope | MicroBatch] = []
        self.killed = False
        self.ended = threading.Event()

    def send(self, order: Envelope | MicroBatch) -> None:
        self.sent.append(order)

    def receive(self, timeout_s: float) -> SlotMessage | None:
        if not self.says.empty():
            said = self.says.get()
            if isinstance(said, Exception):
                raise said
            return said
        if self.ended.wait(0.001):
            raise SlotDiedError("was ended with status 0")
        self._clock.advance(timeout_s * 1e3)
        return None

    def kill(self) -> None:
        self.killed = True

    def end(self) -> None:
        self.ended.set()

    def close(self) -> None:
        self.end()


class Scripts:
    """The processes of a slot, one after the other. By default each is ready at once."""

    def __init__(self, *, ready: bool = True) -> None:
        """`ready`: whether the processes after the first one become ready."""
        self.clock = ManualClock(1000.0)
        self.made: list[Script] = []
        self.ready = ready

    def start(self, job: JobConfig, slot: int) -> Script:
        script = Script(self.clock)
        if self.ready or not self.made:
            script.says.put(READY)
        self.made.append(script)
        return script

    def wait_for(self, count: int) -> Script:
        deadline_s = time.monotonic() + WAIT_S
        while len(self.made) < count:
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        return self.made[-1]


def test_a_process_hangs_that_says_nothing_for_the_time_allowed(start: Start) -> None:
    scripts = Scripts()
    slot = start(config(engine_timeout_s=100.0, slot_restarts=100), scripts.clock, start=scripts.start)
    (first,) = scripts.made
    slot.send(envelope(1))
    first.says.put(Began([envelope(1).position]))
    for _ in range(5):
        first.says.put(Heartbeat(STATS))
    second = scripts.wait_for(2)
    assert first.killed
    # Five heartbeats arrived at once, so its time runs from the last of them.
    assert scripts.clock.wall_ms() >= 1000.0 + 100_000.0
    (retry,) = slot.receive()
    assert isinstance(retry, Retry)
    deadline_s = time.monotonic() + WAIT_S
    while not second.sent:
        assert time.monotonic() < deadline_s
    assert second.sent == [retry.envelope]


def test_what_waits_for_a_process_times_out(start: Start) -> None:
    scripts = Scripts(ready=False)
    job = config(load_timeout_s=1e6)
    job = job.model_copy(update={"engine": job.engine.model_copy(update={"request_timeout_ms": 50_000.0})})
    slot = start(job, scripts.clock, start=scripts.start)
    scripts.made[0].says.put(SlotDiedError("was ended by SIGKILL"))
    # The second process never becomes ready.
    scripts.wait_for(2)
    slot.send(Envelope(0, envelope(1).raw, envelope(1).position, scripts.clock.wall_ms()))
    (answer,) = slot.receive()
    assert isinstance(answer, Answer)
    assert isinstance(answer.record, DeadLetter)
    assert answer.record.reason.startswith("timeout: not answered within 50000 ms")


def test_what_a_process_said_before_it_died_counts(start: Start) -> None:
    scripts = Scripts()
    slot = start(config(), scripts.clock, start=scripts.start)
    (first,) = scripts.made
    slot.send(envelope(1))
    slot.send(envelope(2))
    done = envelope(1)
    first.says.put(Began([done.position]))
    first.says.put([Answer(done.position, letter(done))])
    first.says.put(SlotDiedError("was ended by SIGKILL"))
    second = scripts.wait_for(2)
    assert slot.receive() == [Answer(done.position, letter(done))]
    deadline_s = time.monotonic() + WAIT_S
    while not second.sent:
        assert time.monotonic() < deadline_s
    (order,) = second.sent
    assert isinstance(order, Envelope)
    assert (order.position, order.attempts) == (envelope(2).position, 0)


def test_a_slot_ends_while_it_waits_to_start_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_S", 3600.0)
    monkeypatch.setattr(supervisor, "MOST_BACKOFF_S", 3600.0)
    scripts = Scripts(ready=False)
    slot = start(config(), scripts.clock, start=scripts.start)
    scripts.made[0].says.put(SlotDiedError("was ended by SIGKILL"))
    scripts.wait_for(2).says.put(SlotDiedError("was ended by SIGKILL"))
    slot.close()
    assert not slot._thread.is_alive()


def test_the_first_restart_is_at_once_and_each_further_one_takes_twice_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [backoff_s(deaths) for deaths in range(1, 6)] == [0.0, 1.0, 2.0, 4.0, 8.0]
    assert backoff_s(10**6) == 30.0

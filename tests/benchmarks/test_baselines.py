"""The alternatives give the plain model's answers, each with the requested length, and follow the worker's protocol."""

import io
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from kafka import TopicPartition

from benchmarks.baselines import consumer_loop
from benchmarks.baselines.consumer_loop import ConsumerLoop
from benchmarks.baselines.group import Worker, WorkerGroup
from benchmarks.baselines.padded import answer_together, cut, pad_left
from benchmarks.baselines.worker import Answers, Order, WorkerConfig, serve
from core.errors import UserError
from core.records import Request
from inference_service.config import EngineConfig
from inference_service.model import LoadedModel, load_model
from tests.inference_service.engine_helpers import LAYERS_OF_TWO, save_tiny

PROMPTS = [5, 31, 1, 12, 20]
LIMITS = [3, 9, 6, 1, 12]
TIMEOUT_S = 200.0


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), transformers.Qwen2Config(**LAYERS_OF_TWO))


@pytest.fixture(scope="module")
def engine(path: Path) -> EngineConfig:
    return EngineConfig(model=str(path), device="cpu", max_model_len=64, threads=1)


@pytest.fixture(scope="module")
def model(engine: EngineConfig) -> LoadedModel:
    return load_model(engine)


@pytest.fixture(scope="module")
def requests() -> tuple[Request, ...]:
    tokens = torch.Generator().manual_seed(3)
    return tuple(
        Request(
            request_id=f"r{index}",
            session_id="s",
            user_id="u",
            max_new_tokens=limit,
            created_at_ms=0.0,
            prompt_token_ids=tuple(torch.randint(0, 256, (length,), generator=tokens).tolist()),
        )
        for index, (length, limit) in enumerate(zip(PROMPTS, LIMITS, strict=True))
    )


@pytest.fixture(scope="module")
def plain(model: LoadedModel, requests: tuple[Request, ...]) -> Answers:
    """The answer of `generate` to each prompt alone."""
    answers: Answers = {}
    for request in requests:
        ids = torch.tensor([request.prompt_token_ids])
        made = model.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=request.max_new_tokens
        )[0, ids.shape[1] :].tolist()
        ends = [index for index, token in enumerate(made) if token in model.eos_token_ids]
        answers[request.request_id] = made[: ends[0]] if ends else made
    return answers


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = pad_left([[7], [1, 2, 3]], pad_id=9)
    assert ids.tolist() == [[9, 9, 7], [1, 2, 3]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_an_answer_is_cut_to_its_own_length_and_before_its_end() -> None:
    assert cut([1, 2, 3, 4], limit=2, eos_ids={9}) == [1, 2]
    assert cut([1, 9, 3, 4], limit=3, eos_ids={9}) == [1]
    assert cut([1, 2, 9, 9], limit=2, eos_ids={9}) == [1, 2]
    assert cut([9, 2], limit=2, eos_ids={8, 9}) == []


def test_answered_together_is_answered_as_alone(
    model: LoadedModel, requests: tuple[Request, ...], plain: Answers
) -> None:
    prompts = [list(request.prompt_token_ids or ()) for request in requests]
    together = answer_together(model, prompts, [request.max_new_tokens for request in requests])
    assert together == list(plain.values())


class FakeConsumer:
    """A topic with `records`, polled like a `KafkaConsumer`."""

    def __init__(self, **settings: Any) -> None:
        self._most = settings["max_poll_records"]
        self._assigned = False
        self._primed = False

    records: list[bytes]

    def assign(self, partitions: list[TopicPartition]) -> None:
        self._assigned = True

    def poll(self, timeout_ms: int) -> dict[TopicPartition, list[Any]]:
        assert self._assigned
        if not self._primed or not self.records:
            self._primed = True
            return {}
        polled, FakeConsumer.records = self.records[: self._most], self.records[self._most :]
        return {TopicPartition("requests", 0): [SimpleNamespace(value=value) for value in polled]}

    def close(self) -> None:
        pass


class RecordingProducer:
    sent: list[tuple[str, bytes, bytes]]

    def __init__(self, **settings: Any) -> None:
        pass

    def partitions_for(self, topic: str) -> set[int]:
        return {0}

    def send(self, topic: str, key: bytes, value: bytes) -> None:
        self.sent.append((topic, key, value))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_the_consumer_loop_answers_every_request_under_its_id(
    model: LoadedModel, requests: tuple[Request, ...], plain: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer_loop, "KafkaConsumer", FakeConsumer)
    monkeypatch.setattr(consumer_loop, "KafkaProducer", RecordingProducer)
    FakeConsumer.records = [request.to_json().encode() for request in requests]
    RecordingProducer.sent = []
    loop = ConsumerLoop(model, WorkerConfig(batch=2))
    loop.prepare(Order(brokers="b:1", requests_topic="requests", responses_topic="responses", partitions=(0,)))
    loop.answer(lambda: len(RecordingProducer.sent) == len(requests))
    found = {}
    for topic, key, value in RecordingProducer.sent:
        answer = json.loads(value)
        assert (topic, key.decode()) == ("responses", answer["request_id"])
        found[answer["request_id"]] = answer["token_ids"]
    assert found == plain


def test_a_consumer_loop_that_takes_no_time_asks_no_model(
    model: LoadedModel, requests: tuple[Request, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer_loop, "KafkaConsumer", FakeConsumer)
    monkeypatch.setattr(consumer_loop, "KafkaProducer", RecordingProducer)
    monkeypatch.setattr(model.model, "generate", None)
    FakeConsumer.records = [request.to_json().encode() for request in requests]
    RecordingProducer.sent = []
    loop = ConsumerLoop(model, WorkerConfig(batch=2, zero_time=True))
    loop.prepare(Order(brokers="b:1", requests_topic="requests", responses_topic="responses", partitions=(0,)))
    loop.answer(lambda: len(RecordingProducer.sent) == len(requests))
    found = {key.decode(): json.loads(value)["token_ids"] for _, key, value in RecordingProducer.sent}
    assert found == {request.request_id: [0] for request in requests}


@pytest.mark.parametrize("module", ["transformers_continuous", "run_inference"])
def test_processes_share_a_load_and_answer_it_as_the_plain_model(
    module: str, engine: EngineConfig, requests: tuple[Request, ...], plain: Answers, tmp_path: Path
) -> None:
    workers = [Worker(module, engine, 4, tmp_path / "log", TIMEOUT_S) for _ in range(2)]
    with WorkerGroup(workers) as group:
        for worker in workers:
            assert worker.ready()["model"]["dtype"] == "float32"
        for _ in range(2):
            took_s, answers = group.answer([Order(requests=requests[:2]), Order(requests=requests[2:])])
            assert took_s > 0
            assert answers == plain


def test_a_process_that_cannot_start_says_why_in_one_line(tmp_path: Path) -> None:
    engine = EngineConfig(model=str(tmp_path / "nothing"), device="cpu")
    worker = Worker("consumer_loop", engine, 8, tmp_path / "log", TIMEOUT_S)
    with WorkerGroup([worker]), pytest.raises(UserError, match=r"^baseline consumer_loop has ended: .*nothing[^\n]*$"):
        worker.ready()


class Endless:
    """Answers until it is stopped, and counts its loads."""

    def __init__(self) -> None:
        self.loads = 0

    def prepare(self, order: Order) -> None:
        self.loads += 1

    def answer(self, stopped: Callable[[], bool]) -> Answers:
        while not stopped():
            threading.Event().wait(0.001)
        return {"load": [self.loads]}


def test_a_load_without_an_end_ends_with_the_word_and_the_next_one_follows() -> None:
    reading, writing = os.pipe()
    out = io.StringIO()
    with os.fdopen(reading) as orders, os.fdopen(writing, "w") as words:
        words.write((Order().model_dump_json() + "\ngo\nstop\n") * 2)
        words.close()
        serve(Endless(), {"model": "tiny"}, orders, out)
    said = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [one["says"] for one in said] == ["ready", "prepared", "done", "prepared", "done"]
    assert said[0]["facts"] == {"model": "tiny"}
    assert [one["done"]["answers"] for one in said if one["says"] == "done"] == [{"load": [1]}, {"load": [2]}]

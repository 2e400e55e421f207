"""A slot answers every envelope of a batch with a response, or with a dead letter and its reason."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import Qwen2Config

from cache.config import CacheConfig
from core.clock import SystemClock
from core.records import DeadLetter, Response
from inference_service.completion import Completion, Failure
from inference_service.config import EngineConfig
from inference_service.continuous_engine import ContinuousEngine
from inference_service.stats import EngineStats
from operators.config import BatchingConfig, JobConfig
from operators.envelope import Answer, Envelope, RecordPosition
from operators.slots.slot import InferenceSlot
from tests.inference_service.engine_helpers import LAYERS_OF_TWO, save_tiny
from tests.operators.answers import response_of, responses_of


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    path = save_tiny(tmp_path_factory.mktemp("slot") / "tiny-qwen2", Qwen2Config(**LAYERS_OF_TWO))
    return JobConfig(
        parallelism=1,
        engine=EngineConfig(model=str(path), device="cpu", threads=1, max_running=4, max_model_len=64),
        cache=CacheConfig(chunk_tokens=8),
        batching=BatchingConfig(batch_size=4),
    )


@pytest.fixture(scope="module")
def slot(config: JobConfig) -> InferenceSlot:
    return InferenceSlot(config, 0, SystemClock())


def envelope(number: int, **changes: object) -> Envelope:
    fields = {
        "request_id": f"r{number}",
        "session_id": "s",
        "user_id": "u",
        "max_new_tokens": 3,
        "created_at_ms": SystemClock().wall_ms(),
        "prompt": "a prompt of some tokens",
    }
    raw = json.dumps({key: value for key, value in (fields | changes).items() if value is not None}).encode()
    return Envelope(0, raw, RecordPosition("t", 0, number), SystemClock().wall_ms())


def answered(slot: InferenceSlot, one: Envelope) -> Response:
    (answer,) = slot.answer([one])
    assert answer.position == one.position
    return response_of(answer)


def test_a_line_of_an_openai_batch_file_is_answered_to_the_end_of_the_context(slot: InferenceSlot) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "ignore_eos": True}
    line = {"custom_id": "c1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    one = replace(envelope(9), raw=json.dumps(line).encode(), created_at_ms=SystemClock().wall_ms() - 5000)
    response = answered(slot, one)
    assert (response.request_id, response.session_id, response.created_at_ms) == ("c1", "c1", one.created_at_ms)
    assert (response.finish_reason, response.prompt_tokens + response.output_tokens) == ("context", 64)
    assert response.e2e_ms > 5000


def test_one_answer_for_each_of_a_mixed_batch(slot: InferenceSlot) -> None:
    batch = [
        envelope(0),
        envelope(1, prompt="x" * 64),
        envelope(2, model="another"),
        envelope(3, prompt=None, prompt_token_ids=[10**6]),
        envelope(4, max_new_tokens=1),
    ]
    answers = slot.answer(batch)
    letters = {one.record.request_id: one.record for one in answers if isinstance(one.record, DeadLetter)}
    responses = {one.record.request_id: response_of(one) for one in answers if one.record.request_id not in letters}
    assert {answer.position: answer.record.request_id for answer in answers} == {
        one.position: one.request.request_id for one in batch
    }
    assert sorted(responses) == ["r0", "r4"]
    assert sorted(letters) == ["r1", "r2", "r3"]
    assert "64" in letters["r1"].reason
    assert "'another'" in letters["r2"].reason
    assert "vocabulary" in letters["r3"].reason
    assert letters["r1"].raw == batch[1].raw
    assert letters["r3"].offset == 3
    one = responses["r0"]
    assert (one.slot, one.device, one.batch_size, one.model) == (0, "cpu", 5, "tiny-qwen2")
    assert one.completed_at_ms == responses["r4"].completed_at_ms
    assert one.batch_id == responses["r4"].batch_id
    assert one.prompt_tokens == len("a prompt of some tokens")
    assert one.e2e_ms == one.completed_at_ms - one.created_at_ms
    assert one.e2e_ms >= one.inference_ms > 0
    assert one.ttft_ms is not None
    assert one.e2e_ms >= one.ttft_ms
    assert responses["r4"].tpot_ms is None


def test_records_with_one_id_are_each_answered(slot: InferenceSlot) -> None:
    answers = slot.answer([envelope(number, request_id="r7") for number in (7, 8, 9)])
    assert [answer.record.request_id for answer in answers] == ["r7"] * 3
    assert sorted(answer.position.offset for answer in answers) == [7, 8, 9]


def test_requests_that_step_together_leave_each_by_itself(slot: InferenceSlot) -> None:
    short, long = envelope(1, max_new_tokens=2), envelope(2, max_new_tokens=6)
    began_ms = SystemClock().wall_ms()
    assert [slot.submit(short), slot.submit(long)] == [None, None]
    left: list[list[Answer]] = []
    while slot.unfinished:
        left += [answers] if (answers := slot.step()) else []
    assert [[answer.position for answer in answers] for answers in left] == [[short.position], [long.position]]
    first, second = responses_of(answer for answers in left for answer in answers)
    assert (first.output_tokens, second.output_tokens) == (2, 6)
    assert (first.batch_size, second.batch_size) == (1, 2)
    assert first.batch_id != second.batch_id
    assert began_ms <= first.completed_at_ms <= second.completed_at_ms <= SystemClock().wall_ms()
    assert second.e2e_ms == second.completed_at_ms - second.created_at_ms


def test_times_end_with_the_last_token_and_not_with_the_step(
    slot: InferenceSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = ContinuousEngine.step

    def slow_step(engine: ContinuousEngine) -> list[Completion | Failure]:
        """A step that takes another second after its passes."""
        return [
            replace(
                one, first_token_ms=one.began_ms + 10, last_token_ms=one.began_ms + 30, finished_ms=one.began_ms + 1030
            )
            for one in step(engine)
            if isinstance(one, Completion)
        ]

    monkeypatch.setattr(ContinuousEngine, "step", slow_step)
    slot.submit(envelope(1, max_new_tokens=5))
    answers: list[Answer] = []
    while slot.unfinished:
        answers += slot.step()
    (one,) = responses_of(answers)
    assert one.tpot_ms == pytest.approx(20 / 4)
    assert one.inference_ms == pytest.approx(30)
    assert one.ttft_ms is not None
    assert one.e2e_ms - one.ttft_ms == pytest.approx(1020)


def test_a_request_that_cannot_be_answered_is_done_with_when_it_is_handed_in(slot: InferenceSlot) -> None:
    bad = envelope(5, model="another")
    answer = slot.submit(bad)
    assert answer is not None
    assert isinstance(answer.record, DeadLetter)
    assert (answer.position, answer.record.raw, answer.record.stage) == (bad.position, bad.raw, "inference")
    assert (slot.unfinished, slot.step()) == (0, [])


def test_a_conversation_is_reused_from_batch_to_batch(slot: InferenceSlot) -> None:
    first = answered(slot, envelope(1, prompt="q" * 24))
    second = answered(slot, envelope(2, prompt="q" * 24 + "r" * 8))
    assert (first.local_tokens, second.local_tokens) == (0, 24)
    assert first.batch_id != second.batch_id


def test_a_slot_tells_what_it_has_done_and_holds(config: JobConfig) -> None:
    made = InferenceSlot(config, 0, SystemClock())
    before = made.stats
    assert before.cache is not None
    assert before.engine == EngineStats()
    assert before.cache.used_chunks == 0
    prompt = "q" * 24
    answered(made, envelope(1, prompt=prompt, max_new_tokens=3))
    made.answer([envelope(2, prompt=prompt + "r" * 8, max_new_tokens=4), envelope(3, prompt="s" * 9, max_new_tokens=4)])
    after = made.stats
    assert after.cache is not None
    assert (after.engine.prefilled_tokens, after.engine.local_tokens, after.engine.remote_tokens) == (24 + 8 + 9, 24, 0)
    # Two steps of one sequence, then three of two.
    assert (after.engine.decode_passes, after.engine.decoded_tokens) == (2 + 3, 2 + 6)
    assert after.engine.passes == 3 + 4
    assert (after.engine.failed_passes, after.engine.failed_stores) == (0, 0)
    assert (after.engine.waiting, after.engine.prefilling, after.engine.running) == (0, 0, 0)
    assert (after.cache.local_chunks_hit, after.cache.used_chunks) == (3, 5)
    assert after.resident_bytes > 1 << 20
    made.close()


def test_an_answer_that_its_topic_would_refuse_is_a_letter(
    slot: InferenceSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Response, "is_too_long", True)
    (answer,) = slot.answer([envelope(1, max_new_tokens=3)])
    assert isinstance(answer.record, DeadLetter)
    assert answer.record.reason.startswith("answer: 3 tokens make a record above 4194304 bytes")


def test_a_request_past_its_deadline_is_answered_so(slot: InferenceSlot) -> None:
    answer = answered(slot, envelope(1, created_at_ms=1.0, deadline_ms=10.0))
    assert answer.finish_reason == "deadline"
    assert answer.output_tokens == 0
    assert answer.ttft_ms is None


def test_ready_says_what_serves(slot: InferenceSlot) -> None:
    ready = slot.ready
    assert (ready.slot, ready.device, ready.model, ready.threads) == (0, "cpu", "tiny-qwen2", torch.get_num_threads())
    assert ready.engine.startswith("transformers-")


@pytest.mark.parametrize("grouped", [False, True])
def test_a_slot_says_whom_it_begins_with_and_that_it_gets_on(config: JobConfig, grouped: bool) -> None:
    said: list[RecordPosition | None] = []
    made = InferenceSlot(config, 0, SystemClock(), on_begin=said.extend, on_pass=lambda: said.append(None))
    requests = [envelope(number, max_new_tokens=3, prompt="p" * number) for number in (1, 2)]
    assert said == []
    if grouped:
        made.answer(requests)
    else:
        for request in requests:
            made.submit(request)
        while made.unfinished:
            made.step()
    assert said == [*(request.position for request in requests), None, None, None]
    made.close()

"""Several answers to one request, and log-probabilities of its prompt."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engine_helpers import CHUNK, MemoryCache, answers, ask, make_engine, plain_answer, tokens_of

from core.clock import ManualClock
from core.records import FinishReason, Request
from inference_service import active_sequence
from inference_service.active_sequence import Piece
from inference_service.completion import Completion, Failure
from inference_service.model import LoadedModel

PROMPT = tokens_of(21, 19)


def token_ids(completion: Completion) -> list[tuple[int, ...]]:
    return [choice.token_ids for choice in completion.choices]


def test_choices_differ_and_the_first_is_the_only_one_of_a_request_for_one(qwen2: LoadedModel) -> None:
    sampled: dict[str, Any] = {"temperature": 1.0, "seed": 3}
    engine = make_engine(qwen2)
    several = answers(engine.run([ask("a", PROMPT, 8, n=4, **sampled)]))["a"]
    one = answers(make_engine(qwen2).run([ask("a", PROMPT, 8, **sampled)]))["a"]
    assert len(set(token_ids(several))) == 4
    assert several.choices[0] == one.choices[0]
    # The prompt once, and its last token for each of the others.
    assert engine.stats.prefilled_tokens == len(PROMPT) + 3
    assert (several.prompt_tokens, several.computed_tokens) == (len(PROMPT), len(PROMPT))


@pytest.mark.parametrize("rows", [2, 3, 9])
def test_the_prompt_is_computed_once_while_any_of_its_choices_runs(qwen2: LoadedModel, rows: int) -> None:
    """The first one leaves before the last ones can begin."""
    engine = make_engine(qwen2, max_running=rows)
    (found,) = answers(engine.run([ask("a", PROMPT, 3, n=8)])).values()
    assert token_ids(found) == [plain_answer(qwen2, PROMPT, 3)] * 8
    assert engine.stats.prefilled_tokens == len(PROMPT) + 7


def test_greedy_choices_are_the_models_own_answer(model: LoadedModel) -> None:
    (found,) = answers(make_engine(model, max_running=2).run([ask("a", PROMPT, 6, n=3)])).values()
    assert token_ids(found) == [plain_answer(model, PROMPT, 6)] * 3
    assert [choice.finish_reason for choice in found.choices] == [FinishReason.LENGTH] * 3


def test_a_choice_that_fails_fails_its_request_once(qwen2: LoadedModel) -> None:
    engine = make_engine(qwen2, max_running=6)
    forward = engine._runner.forward

    def failing(pieces: Sequence[Piece]) -> torch.Tensor:
        bad = {one.row for one in engine._rows.running if one.request.request_id == "bad" and one.choice == 1}
        if any(piece.row in bad and piece.start >= len(PROMPT) + 2 for piece in pieces):
            raise RuntimeError("no")
        return forward(pieces)

    engine._runner.forward = failing  # type: ignore[method-assign]
    done = engine.run([ask("bad", PROMPT, 8, n=3), ask("good", tokens_of(5, 9), 8, n=2)])
    failures = [one for one in done if isinstance(one, Failure)]
    assert [one.request.request_id for one in failures] == ["bad"]
    assert (
        token_ids(answers(one for one in done if one not in failures)["good"])
        == [plain_answer(qwen2, tokens_of(5, 9), 8)] * 2
    )
    assert engine.unfinished == 0
    assert not list(engine._rows)


def test_a_choice_that_cannot_begin_takes_out_those_that_are_in_pieces(qwen2: LoadedModel) -> None:
    cache = MemoryCache(qwen2.chunk_shape(CHUNK), lambda index: "gone")
    engine = make_engine(qwen2, cache=cache, step_prefill_tokens=8)
    engine.submit(ask("a", PROMPT, 1, n=3), 0.0)
    while not any(sequence.choice for sequence in engine._rows.prefilling):
        engine.step()
    cache.refuses = {PROMPT}
    (failure,) = engine.step()
    assert isinstance(failure, Failure)
    assert failure.reason == "cache failed: RuntimeError: the cache is broken"
    assert (engine.unfinished, list(engine._rows), engine.stats.waiting) == (0, [], 0)


@pytest.mark.parametrize("steps", range(5))
def test_cancelling_takes_all_choices_out(qwen2: LoadedModel, steps: int) -> None:
    engine = make_engine(qwen2, max_running=3)
    gone, kept = ask("gone", PROMPT, 9, n=4), ask("kept", tokens_of(8, 12), 6)
    for request in (gone, kept):
        engine.submit(request, 0.0)
    done = [one for _ in range(steps) for one in engine.step()]
    assert engine.cancel(gone)
    while engine.unfinished:
        done += engine.step()
    assert [one.request.request_id for one in done] == ["kept"]
    assert answers(done)["kept"].token_ids == plain_answer(qwen2, tokens_of(8, 12), 6)


def test_a_deadline_ends_the_choices_that_could_not_begin(qwen2: LoadedModel) -> None:
    clock = ManualClock()
    engine = make_engine(qwen2, clock=clock)
    engine.submit(ask("a", PROMPT, 9, n=3, deadline_ms=10.0, created_at_ms=clock.wall_ms()), 0.0)
    clock.advance(20.0)
    (found,) = answers(engine.step()).values()
    assert [(choice.finish_reason, choice.token_ids) for choice in found.choices] == [(FinishReason.DEADLINE, ())] * 3
    assert engine.unfinished == 0


# Log-probabilities of the prompt.


@pytest.mark.parametrize("reuse", [False, True])
def test_prompt_logprobs_are_the_models_own(model: LoadedModel, monkeypatch: pytest.MonkeyPatch, reuse: bool) -> None:
    monkeypatch.setattr(active_sequence, "MOST_SCORED_TOKENS", 7)
    cache = MemoryCache(model.chunk_shape(CHUNK)) if reuse else None
    engine = make_engine(model, cache=cache, step_prefill_tokens=16)
    requests: list[Request] = [
        ask("plain", PROMPT, 4),
        ask("scored", PROMPT, 4, prompt_logprobs=2, n=2),
        ask("short", PROMPT[:1], 4, prompt_logprobs=0),
    ]
    engine.run(requests[:1])
    found = answers(engine.run(requests))
    assert found["plain"].prompt_logprobs is None
    assert found["short"].prompt_logprobs == (None,)
    scored = found["scored"]
    assert scored.computed_tokens == len(PROMPT)
    assert token_ids(scored) == [plain_answer(model, PROMPT, 4)] * 2
    assert scored.prompt_logprobs is not None
    first, *others = scored.prompt_logprobs
    assert first is None
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        expected = torch.log_softmax(model.model(ids, attention_mask=torch.ones_like(ids)).logits[0].float(), -1)
    assert len(others) == len(PROMPT) - 1
    for row, token, each in zip(expected, PROMPT[1:], others, strict=False):
        assert each is not None
        assert each.token_id == token
        assert each.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert [value for _, value in each.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)

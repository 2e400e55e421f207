"""Ends of answers, the order of requests, and the effect of a failing request on others."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from engine_helpers import (
    CHUNK,
    EOS_ID,
    MAX_LEN,
    MemoryCache,
    answers,
    ask,
    load_tiny,
    make_engine,
    plain_answer,
    tokens_of,
)

from core.clock import ManualClock
from core.errors import UserError
from core.records import FinishReason
from inference_service.active_sequence import Piece
from inference_service.byte_tokenizer import byte_tokenizer
from inference_service.completion import Completion, Failure
from inference_service.config import EngineConfig
from inference_service.continuous_engine import ContinuousEngine
from inference_service.model import LoadedModel, load_model

PROMPT = tokens_of(7, 20)


class TickingClock(ManualClock):
    """A clock that advances by `tick_ms` at every forward pass of `engine`."""

    def drive(self, engine: ContinuousEngine, tick_ms: float) -> None:
        forward = engine._runner.forward

        def ticking(pieces: Sequence[Piece]) -> torch.Tensor:
            self.advance(tick_ms)
            return forward(pieces)

        engine._runner.forward = ticking


def only(done: list[Completion | Failure]) -> Completion:
    (one,) = answers(done).values()
    return one


@pytest.mark.parametrize("max_new_tokens", [1, 2, 9])
def test_an_answer_ends_at_its_length(model: LoadedModel, max_new_tokens: int) -> None:
    one = only(make_engine(model).run([ask("a", PROMPT, max_new_tokens)]))
    assert one.finish_reason is FinishReason.LENGTH
    assert len(one.token_ids) == max_new_tokens


@pytest.mark.parametrize("prompt", [MAX_LEN - 1, MAX_LEN - 2, MAX_LEN - 9])
def test_an_answer_ends_where_the_row_is_full(model: LoadedModel, prompt: int) -> None:
    tokens = tokens_of(prompt, prompt)
    one = only(make_engine(model, cache=MemoryCache(model.chunk_shape(CHUNK))).run([ask("a", tokens, 1000)]))
    assert one.finish_reason is FinishReason.CONTEXT
    assert len(one.token_ids) == MAX_LEN - prompt
    assert one.token_ids == plain_answer(model, tokens, 1000)


def with_end_token(path: Path, folder: Path, token: int | list[int]) -> LoadedModel:
    """The same weights with a generation configuration in which `token` ends an answer."""
    # The model as the library loads it, because packed layers cannot be saved.
    model = load_model(EngineConfig(model=str(path), device="cpu")).model
    model.generation_config.eos_token_id = token
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return load_tiny(folder)


@pytest.mark.parametrize("end_at", [0, 1, 4])
def test_an_answer_ends_before_the_end_token(
    qwen2: LoadedModel, tiny_paths: dict[str, Path], tmp_path: Path, end_at: int
) -> None:
    endless = plain_answer(qwen2, PROMPT, 12)
    token = endless[end_at]
    assert token not in endless[:end_at]
    model = with_end_token(tiny_paths["qwen2"], tmp_path / "ending", [EOS_ID, token])
    assert model.eos_token_ids == {EOS_ID, token}
    others = {f"o{seed}": tokens_of(seed, 15) for seed in range(5)}
    done = answers(make_engine(model).run([ask("a", PROMPT, 12), *(ask(n, p, 12) for n, p in others.items())]))
    assert done["a"].finish_reason is FinishReason.STOP
    assert done["a"].token_ids == endless[:end_at]
    for name, prompt in others.items():
        assert done[name].token_ids == plain_answer(model, prompt, 12)


def test_the_end_token_at_the_last_place_is_a_stop(
    qwen2: LoadedModel, tiny_paths: dict[str, Path], tmp_path: Path
) -> None:
    endless = plain_answer(qwen2, PROMPT, 5)
    model = with_end_token(tiny_paths["qwen2"], tmp_path / "ending", endless[-1])
    one = only(make_engine(model).run([ask("a", PROMPT, 5)]))
    assert (one.finish_reason, one.token_ids) == (FinishReason.STOP, endless[:-1])


def test_a_deadline_ends_an_answer_with_what_there_is(qwen2: LoadedModel) -> None:
    clock = TickingClock(1000.0)
    engine = make_engine(qwen2, clock=clock)
    clock.drive(engine, 10.0)
    engine.submit(ask("late", PROMPT, 30, created_at_ms=1000.0, deadline_ms=35.0), 1000.0)
    engine.submit(ask("free", PROMPT, 30), 1000.0)
    done = []
    while engine.unfinished:
        done += engine.step()
    found = answers(done)
    # Both prompts in one pass, then a decode of both a step: 1010 | 1020 | 1030 | 1040.
    assert found["late"].finish_reason is FinishReason.DEADLINE
    assert found["late"].token_ids == plain_answer(qwen2, PROMPT, 4)
    assert (found["late"].began_ms, found["late"].first_token_ms, found["late"].finished_ms) == (1000, 1010, 1040)
    assert found["free"].token_ids == plain_answer(qwen2, PROMPT, 30)


@pytest.mark.parametrize(("now_ms", "expired"), [(1049.9, False), (1050.0, True), (9999.0, True)])
def test_a_request_past_its_deadline_is_not_prefilled(qwen2: LoadedModel, now_ms: float, expired: bool) -> None:
    cache = MemoryCache(qwen2.chunk_shape(CHUNK))
    engine = make_engine(qwen2, cache=cache, clock=ManualClock(now_ms))
    one = only(engine.run([ask("a", PROMPT, 2, created_at_ms=1000.0, deadline_ms=50.0)]))
    if expired:
        assert (one.finish_reason, one.token_ids, one.text) == (FinishReason.DEADLINE, (), "")
        assert one.first_token_ms is None
        assert (one.prompt_tokens, one.local_tokens, cache.stored) == (20, 0, {})
    else:
        assert one.finish_reason is FinishReason.LENGTH


def test_times_are_in_order(qwen2: LoadedModel) -> None:
    clock = TickingClock(500.0)
    engine = make_engine(qwen2, clock=clock)
    clock.drive(engine, 10.0)
    engine.submit(ask("a", PROMPT, 3), 450.0)
    done = engine.step() + engine.step() + engine.step()
    one = only(done)
    assert (one.arrived_ms, one.began_ms, one.first_token_ms, one.finished_ms) == (450, 500, 510, 530)


def test_a_higher_priority_goes_first_and_then_who_came_first(qwen2: LoadedModel) -> None:
    engine = make_engine(qwen2, max_running=1)
    priorities = {"a": 0, "b": 5, "c": 0, "d": -3, "e": 5, "f": 1}
    done = engine.run([ask(name, PROMPT, 2, priority=priority) for name, priority in priorities.items()])
    assert [one.request.request_id for one in done] == ["b", "e", "f", "a", "c", "d"]


def test_no_more_run_than_there_are_rows(qwen2: LoadedModel) -> None:
    engine = make_engine(qwen2, max_running=3)
    for index in range(5):
        engine.submit(ask(str(index), PROMPT, 3), 0.0)
    assert engine.step() == []
    assert (len(engine._rows.running), engine.unfinished) == (3, 5)
    assert engine.step() == []
    assert [len(engine.step()), engine.unfinished] == [3, 2]


def test_a_request_that_can_not_be_answered_fails_at_submit(qwen2: LoadedModel) -> None:
    engine = make_engine(qwen2)
    with pytest.raises(UserError, match="outside the vocabulary"):
        engine.submit(ask("a", [258]), 0.0)
    assert engine.unfinished == 0
    done = engine.run([ask("bad", [258]), ask("good", PROMPT)])
    assert isinstance(done[0], Failure)
    assert done[0].request.request_id == "bad"
    assert done[0].reason == "prompt_token_ids: token 258 is outside the vocabulary of 258 tokens"
    assert only(done[1:]).token_ids == plain_answer(qwen2, PROMPT, 6)


def run_with_one_bad(engine: ContinuousEngine, model: LoadedModel, bad: tuple[int, ...]) -> Failure:
    """Run `bad` with others, some already decoding; check that `bad` fails and the others answer as if alone."""
    others = {f"o{seed}": tokens_of(seed, 12 + seed) for seed in range(6)}
    done: list[Completion | Failure] = []
    for name, prompt in list(others.items())[:3]:
        engine.submit(ask(name, prompt, 8), 0.0)
    done += engine.step()
    engine.submit(ask("bad", bad, 8), 0.0)
    for name, prompt in list(others.items())[3:]:
        engine.submit(ask(name, prompt, 8), 0.0)
    while engine.unfinished:
        done += engine.step()
    (failure,) = (one for one in done if isinstance(one, Failure))
    found = answers(one for one in done if isinstance(one, Completion))
    assert {name: one.token_ids for name, one in found.items()} == {
        name: plain_answer(model, prompt, 8) for name, prompt in others.items()
    }
    assert failure.request.request_id == "bad"
    return failure


def test_a_failing_look_up_fails_alone(model: LoadedModel) -> None:
    cache = MemoryCache(model.chunk_shape(CHUNK))
    cache.refuses.add(PROMPT)
    failure = run_with_one_bad(make_engine(model, cache=cache), model, PROMPT)
    assert failure.reason == "cache failed: RuntimeError: the cache is broken"


def test_a_failing_prefill_fails_alone_and_lets_its_chunks_go(model: LoadedModel) -> None:
    cache = MemoryCache(model.chunk_shape(CHUNK))
    engine = make_engine(model, cache=cache)
    engine.run([ask("warm", PROMPT)])
    forward = engine._runner.forward

    def failing(pieces: Sequence[Piece]) -> torch.Tensor:
        logits = forward(pieces)
        if any(piece.start > 0 and len(piece.tokens) > 1 for piece in pieces):
            raise RuntimeError("out of memory")
        return logits

    engine._runner.forward = failing
    failure = run_with_one_bad(engine, model, PROMPT)
    assert failure.reason == "prefill failed: RuntimeError: out of memory"
    assert cache.open_prefixes == 0


def test_the_cost_of_a_prefill_is_learnt_from_whole_chunks(qwen2: LoadedModel) -> None:
    cache = MemoryCache(qwen2.chunk_shape(CHUNK), place=lambda index: "gone")
    clock = TickingClock()
    engine = make_engine(qwen2, cache=cache, clock=clock, max_running=1)
    clock.drive(engine, 40.0)
    # Log-probabilities of the prompt cost more than its tokens.
    engine.run([ask("scored", tokens_of(1, 20), 1, prompt_logprobs=1)])
    for length in (CHUNK - 1, 20, 10, 3, 20):
        engine.run([ask("a", tokens_of(length, length), 1)])
    assert cache.costs == pytest.approx([None, None, 2.0, 0.8 * 2.0 + 0.2 * 4.0, 0.8 * 2.0 + 0.2 * 4.0])


def test_closing_closes_the_cache(qwen2: LoadedModel) -> None:
    cache = MemoryCache(qwen2.chunk_shape(CHUNK))
    make_engine(qwen2, cache=cache).close()
    assert cache.closed
    make_engine(qwen2).close()


def test_the_text_is_that_of_the_tokens(qwen2: LoadedModel) -> None:
    prompt = tuple(qwen2.tokenizer("Why do rivers meander?")["input_ids"])
    one = only(make_engine(qwen2).run([ask("a", prompt, 9)]))
    assert one.text == qwen2.tokenizer.decode(list(one.token_ids))
    assert one.text


def test_a_store_that_fails_is_a_miss_and_not_a_failed_request(qwen2: LoadedModel) -> None:
    class FullDisk(MemoryCache):
        def store(self, *_: object) -> int:
            raise OSError("no room")

    prompts = {str(count): tokens_of(count, count) for count in (CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 3)}
    engine = make_engine(qwen2, cache=FullDisk(qwen2.chunk_shape(CHUNK)), max_running=2)
    found = answers(engine.run([ask(name, prompt, CHUNK + 1) for name, prompt in prompts.items()]))
    assert {name: found[name].token_ids for name in prompts} == {
        name: plain_answer(qwen2, prompt, CHUNK + 1) for name, prompt in prompts.items()
    }

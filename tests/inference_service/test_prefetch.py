"""Requests whose chunks are on their way from Redis: when they begin, and what is released."""

import pytest
from engine_helpers import CHUNK, Coming, MemoryCache, answers, ask, make_engine, plain_answer, tokens_of

from core.clock import ManualClock
from core.records import FinishReason
from inference_service.continuous_engine import ContinuousEngine
from inference_service.model import LoadedModel


def coming(cache: MemoryCache, *prompts: tuple[int, ...]) -> list[Coming]:
    """Chunks of these prompts arrive when the test says so."""
    cache.coming |= {prompt: Coming() for prompt in prompts}
    return [cache.coming[prompt] for prompt in prompts]


def begun(engine: ContinuousEngine) -> list[str]:
    return [sequence.request.request_id for sequence in (*engine._rows.running, *engine._rows.prefilling)]


def test_the_step_loop_does_not_wait_while_others_run(qwen2: LoadedModel) -> None:
    cache = MemoryCache(qwen2.chunk_shape(CHUNK))
    slow, quick = tokens_of(1, 20), tokens_of(2, 20)
    (fetch,) = coming(cache, slow)
    engine = make_engine(qwen2, cache=cache)
    for name, prompt in (("slow", slow), ("quick", quick)):
        engine.submit(ask(name, prompt, 20), 0.0)
    for _ in range(3):
        engine.step()
    assert begun(engine) == ["quick"]
    assert fetch.waits == 0
    fetch.ready = True
    engine.step()
    assert begun(engine) == ["quick", "slow"]
    done = {}
    while engine.unfinished:
        done |= answers(engine.step())
    for name, prompt in (("slow", slow), ("quick", quick)):
        assert done[name].token_ids == plain_answer(qwen2, prompt, 20)


def test_where_nothing_runs_a_step_waits_for_the_first_of_the_queue(qwen2: LoadedModel) -> None:
    cache = MemoryCache(qwen2.chunk_shape(CHUNK))
    first, second = coming(cache, tokens_of(1, 20), tokens_of(2, 20))
    engine = make_engine(qwen2, cache=cache)
    engine.submit(ask("a", tokens_of(1, 20)), 0.0)
    engine.submit(ask("b", tokens_of(2, 20)), 0.0)
    assert engine.step() == []
    assert (first.waits, second.waits) == (1, 0)
    assert engine.stats.passes == 0
    first.ready = True
    engine.step()
    assert begun(engine) == ["a"]
    assert cache.taken == [first]


@pytest.mark.parametrize(("rows", "expected"), [(1, []), (2, ["c"]), (3, ["c", "d"])])
def test_who_passes_leaves_room_for_those_that_wait(qwen2: LoadedModel, rows: int, expected: list[str]) -> None:
    """A request that waits for its chunks begins as soon as they arrive, whatever requests came after it."""
    cache = MemoryCache(qwen2.chunk_shape(CHUNK))
    (fetch,) = coming(cache, tokens_of(1, 20))
    engine = make_engine(qwen2, cache=cache, max_running=rows)
    engine.submit(ask("a", tokens_of(1, 20), 30), 0.0)
    for name in ("c", "d", "e"):
        engine.submit(ask(name, tokens_of(ord(name), 9), 30), 0.0)
    engine.step()
    engine.step()
    assert begun(engine) == expected
    fetch.ready = True
    engine.step()
    assert begun(engine) == [*expected, "a"]


def test_the_tokens_that_a_waiting_request_may_hold_are_left_to_it(qwen2: LoadedModel) -> None:
    cache = MemoryCache(qwen2.chunk_shape(CHUNK))
    (fetch,) = coming(cache, tokens_of(1, 20))
    engine = make_engine(qwen2, cache=cache, max_running=4, max_running_tokens=60)
    engine.submit(ask("a", tokens_of(1, 20), 20), 0.0)
    engine.submit(ask("heavy", tokens_of(2, 20), 20), 0.0)
    engine.step()
    assert begun(engine) == []
    fetch.ready = True
    engine.step()
    assert begun(engine) == ["a"]


def test_the_queue_keeps_its_order(qwen2: LoadedModel) -> None:
    cache = MemoryCache(qwen2.chunk_shape(CHUNK))
    prompts = {name: tokens_of(ord(name), 9) for name in "abcd"}
    fetches = coming(cache, *prompts.values())
    engine = make_engine(qwen2, cache=cache, max_running=4)
    for name, prompt in prompts.items():
        engine.submit(ask(name, prompt, 9, priority=int(name == "c")), 0.0)
    engine.step()
    for fetch in fetches:
        fetch.ready = True
    engine.step()
    assert begun(engine) == ["c", "a", "b", "d"]


@pytest.mark.parametrize("how", ["deadline", "time-out", "close"])
def test_what_was_fetched_for_a_request_that_never_begins_is_dropped(qwen2: LoadedModel, how: str) -> None:
    clock = ManualClock(1000.0)
    cache = MemoryCache(qwen2.chunk_shape(CHUNK))
    (fetch,) = coming(cache, tokens_of(1, 20))
    engine = make_engine(qwen2, cache=cache, clock=clock, request_timeout_ms=500)
    limit = 100 if how == "deadline" else None
    engine.submit(ask("a", tokens_of(1, 20), created_at_ms=1000.0, deadline_ms=limit), 1000.0)
    engine.step()
    assert not fetch.cancelled
    if how == "close":
        engine.close()
    else:
        clock.advance(600)
        (one,) = engine.step()
        assert how == "time-out" or answers([one])["a"].finish_reason is FinishReason.DEADLINE
    assert fetch.cancelled


def test_where_chunks_cannot_be_stored_prompts_with_one_beginning_wait_once(qwen2: LoadedModel) -> None:
    class Full(MemoryCache):
        def store(self, *_: object) -> int:
            return 0

    engine = make_engine(qwen2, cache=Full(qwen2.chunk_shape(CHUNK)), max_running=8)
    shared = tokens_of(1, 2 * CHUNK)
    prompts = {f"r{number}": shared + tokens_of(number, 4) for number in range(6)}
    for name, prompt in prompts.items():
        engine.submit(ask(name, prompt, 12), 0.0)
    engine.step()
    assert begun(engine) == ["r0"]
    engine.step()
    assert begun(engine) == list(prompts)
    done = {}
    while engine.unfinished:
        done |= answers(engine.step())
    assert {name: done[name].token_ids for name in prompts} == {
        name: plain_answer(qwen2, prompt, 12) for name, prompt in prompts.items()
    }


@pytest.mark.parametrize("budget", [1, 3, 16, 0])
def test_warming_up_computes_no_more_than_a_step_may(qwen2: LoadedModel, budget: int) -> None:
    engine = make_engine(qwen2, max_running=5, step_prefill_tokens=budget)
    forward, passes = engine._runner.forward, []

    def watched(pieces):  # type: ignore[no-untyped-def]
        passes.append([len(piece.tokens) for piece in pieces])
        return forward(pieces)

    engine._runner.forward = watched
    engine.warm_up()
    prompts, decode = passes
    assert decode == [1] * 5
    assert sum(prompts) <= (budget or 2048)
    assert max(prompts) == min(budget or CHUNK, CHUNK)

"""Greedy answers equal those of the model's `generate`, token for token, with any reuse and any batch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_helpers import (
    CHUNK,
    MAX_LEN,
    MemoryCache,
    answers,
    ask,
    make_engine,
    plain_answer,
    tokens_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference_service.active_sequence import Piece
from inference_service.config import EngineConfig
from inference_service.kv_pool import KVPool
from inference_service.model import LoadedModel
from inference_service.runner import Runner
from inference_service.transformers_engine import load_checked_model

LENGTHS = sorted({1, 2} | {chunks * CHUNK + rest for chunks in (1, 2, 3, 5) for rest in (-1, 0, 1)})
PROMPTS = {f"r{length}": tokens_of(length, length) for length in LENGTHS}

PLACES: dict[str, Callable[[int], str]] = {
    "all local": lambda index: "local",
    "all remote": lambda index: "remote",
    "local, then remote": lambda index: "local" if index < 2 else "remote",
    "remote and local in turn": lambda index: "remote" if index % 2 == 0 else "local",
    "from the third chunk on gone": lambda index: "local" if index < 2 else "gone",
    "all gone": lambda index: "gone",
}


def reused_tokens(length: int, place: Callable[[int], str]) -> dict[str, int]:
    """The expected count of reused tokens if all full chunks of a prompt are stored: never its last token."""
    counted = {"local": 0, "remote": 0}
    for position in range(length - 1):
        chunk = position // CHUNK
        if chunk >= length // CHUNK or "gone" in [place(before) for before in range(chunk + 1)]:
            break
        counted[place(chunk)] += 1
    return counted


def test_the_tiny_models_answer_with_some_variety(model: LoadedModel) -> None:
    """Otherwise an engine that confuses its rows could pass."""
    given_answers = [plain_answer(model, prompt, 6) for prompt in PROMPTS.values()]
    assert len(set(given_answers)) == len(given_answers)
    assert len({token for answer in given_answers for token in answer}) > 20


@pytest.mark.parametrize("max_running", [1, 3, 32])
def test_without_a_cache(model: LoadedModel, max_running: int) -> None:
    engine = make_engine(model, max_running=max_running)
    budgets = {name: 3 + index % 5 for index, name in enumerate(PROMPTS)}
    done = answers(engine.run([ask(name, prompt, budgets[name]) for name, prompt in PROMPTS.items()]))
    assert {name: one.token_ids for name, one in done.items()} == {
        name: plain_answer(model, prompt, budgets[name]) for name, prompt in PROMPTS.items()
    }
    assert all(one.computed_tokens == one.prompt_tokens == len(PROMPTS[name]) for name, one in done.items())


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_with_reuse(model: LoadedModel, place: Callable[[int], str]) -> None:
    cache = MemoryCache(model.chunk_shape(CHUNK))
    engine = make_engine(model, cache=cache, max_running=3)
    requests = [ask(name, prompt) for name, prompt in PROMPTS.items()]
    expected = {name: plain_answer(model, prompt, 6) for name, prompt in PROMPTS.items()}

    first = answers(engine.run(requests))
    assert {name: one.token_ids for name, one in first.items()} == expected
    assert all(one.local_tokens == one.remote_tokens == 0 for one in first.values())

    cache.place = place
    again = answers(engine.run(requests))
    assert {name: one.token_ids for name, one in again.items()} == expected
    for name, one in again.items():
        counted = reused_tokens(len(PROMPTS[name]), place)
        assert {"local": one.local_tokens, "remote": one.remote_tokens} == counted
        assert one.computed_tokens == len(PROMPTS[name]) - sum(counted.values()) >= 1
        assert (one.cache_capacity_chunks, one.cache_used_chunks) == (cache.capacity_chunks, cache.used_chunks)
    assert cache.open_prefixes == 0


def test_prompts_that_share_a_prefix_reuse_it(model: LoadedModel) -> None:
    """Also within one batch, and only as far as the prompts are equal."""
    engine = make_engine(model, cache=MemoryCache(model.chunk_shape(CHUNK)))
    common = tokens_of(1, 2 * CHUNK)
    prompts = {
        name: (*common[:kept], *tokens_of(tail, 12)) for name, kept, tail in (("a", 16, 2), ("b", 15, 3), ("c", 16, 4))
    }
    done = answers(engine.run([ask(name, prompt) for name, prompt in prompts.items()]))
    assert {name: one.token_ids for name, one in done.items()} == {
        name: plain_answer(model, prompt, 6) for name, prompt in prompts.items()
    }
    assert {name: one.local_tokens for name, one in done.items()} == {"a": 0, "b": CHUNK, "c": 2 * CHUNK}


def test_the_next_turn_reuses_the_answer_too(model: LoadedModel) -> None:
    """When a request ends, the chunks that its answer completes are stored with the right tensors."""
    engine = make_engine(model, cache=MemoryCache(model.chunk_shape(CHUNK)))
    prompts = {f"t{seed}": tokens_of(seed, 10 + seed) for seed in range(6)}
    first = answers(engine.run([ask(name, prompt, 12 + len(prompt) % 3) for name, prompt in prompts.items()]))
    turns = {name: (*prompts[name], *one.token_ids, *tokens_of(99, 3)) for name, one in first.items()}
    second = answers(engine.run([ask(name, turn) for name, turn in turns.items()]))
    for name, one in second.items():
        assert one.token_ids == plain_answer(model, turns[name], 6)
        # All tokens of an answer except the last have run through the model, so they have keys and values.
        held = len(turns[name]) - 4
        assert one.local_tokens == held // CHUNK * CHUNK > len(prompts[name]) // CHUNK * CHUNK


def test_another_salt_shares_nothing(qwen2: LoadedModel) -> None:
    engine = make_engine(qwen2, cache=MemoryCache(qwen2.chunk_shape(CHUNK)))
    prompt = tokens_of(5, 20)
    done = answers(engine.run([ask("a", prompt, cache_salt="x"), ask("b", prompt, cache_salt="y")]))
    assert done["b"].local_tokens == 0
    done = answers(engine.run([ask("a", prompt, cache_salt="y")]))
    assert done["a"].local_tokens == 2 * CHUNK


def test_reused_chunks_are_what_the_answer_is_made_of(model: LoadedModel) -> None:
    """With other tensors in the cache the answers change, so reuse is real."""
    cache = MemoryCache(model.chunk_shape(CHUNK))
    engine = make_engine(model, cache=cache)
    requests = [ask(name, prompt) for name, prompt in PROMPTS.items() if len(prompt) > 2 * CHUNK]
    right = answers(engine.run(requests))
    for chunk in cache.stored.values():
        # Values at other positions than their keys; both moved together would be the same set of pairs.
        chunk[:, 1] = chunk[:, 1].roll(1, dims=2)
    wrong = answers(engine.run(requests))
    assert all(wrong[name].token_ids != right[name].token_ids for name in right)


@pytest.mark.parametrize("bystanders", [0, 5])
def test_what_a_row_held_before_does_not_show(model: LoadedModel, bystanders: int) -> None:
    engine = make_engine(model, max_running=1 + bystanders)
    engine._runner.pool._memory.fill_(1e4)
    requests = [ask(f"b{seed}", tokens_of(seed, 30 + seed), 20) for seed in range(bystanders)]
    done = answers(engine.run([*requests, ask("short", PROMPTS["r7"], 12)]))
    assert done["short"].token_ids == plain_answer(model, PROMPTS["r7"], 12)


arrivals = st.lists(
    st.tuples(st.sampled_from(sorted(PROMPTS)), st.integers(1, 9), st.integers(0, 3), st.integers(-1, 1)),
    min_size=1,
    max_size=14,
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrivals=arrivals, max_running=st.integers(1, 5), reuse=st.sampled_from([None, *sorted(PLACES)]))
def test_whoever_enters_and_leaves_when(
    qwen2: LoadedModel, arrivals: list[tuple[str, int, int, int]], max_running: int, reuse: str | None
) -> None:
    cache = None if reuse is None else MemoryCache(qwen2.chunk_shape(CHUNK), PLACES[reuse])
    engine = make_engine(qwen2, cache=cache, max_running=max_running)
    done = []
    for index, (name, max_new_tokens, steps, priority) in enumerate(arrivals):
        engine.submit(ask(str(index), PROMPTS[name], max_new_tokens, priority=priority), 0.0)
        for _ in range(steps):
            done += engine.step()
    while engine.unfinished:
        done += engine.step()
    assert len(done) == len(arrivals)
    found = {name: one.token_ids for name, one in answers(done).items()}
    assert found == {
        str(index): plain_answer(qwen2, PROMPTS[name], max_new_tokens)
        for index, (name, max_new_tokens, _, _) in enumerate(arrivals)
    }
    assert cache is None or cache.open_prefixes == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_is_close_to_the_model_alone(tiny_paths: dict[str, Path], dtype: str) -> None:
    """Rounding may change greedy tokens, but logits after a reused prefix differ by rounding only."""
    config = EngineConfig(model=str(tiny_paths["qwen2"]), device="cpu", dtype=dtype, max_model_len=MAX_LEN)
    model = load_checked_model(config)
    prompt = tokens_of(3, 5 * CHUNK)
    pool = KVPool(model.chunk_shape(CHUNK), 2, MAX_LEN, model.device)
    runner = Runner(model, pool)
    runner.forward([Piece(0, 0, prompt)])
    chunk = torch.empty(pool.shape.size, dtype=model.dtype)
    for index in range(4):
        pool.read_chunk(0, index, chunk)
        pool.load_chunk(1, index, chunk)
    found = runner.forward([Piece(1, 4 * CHUNK, prompt[4 * CHUNK :])])[0]
    with torch.inference_mode():
        alone = model.model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]
    assert found.dtype is getattr(torch, dtype)
    assert float((found - alone).float().abs().max()) <= 0.05 * float(alone.float().abs().max())

"""Keys, values and logits that are not finite fail their own request, and do not affect any other."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from engine_helpers import CHUNK, LAYERS_OF_TWO, MemoryCache, answers, ask, load_tiny, make_engine, save_tiny, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

from core.clock import ManualClock
from inference_service.active_sequence import Piece
from inference_service.completion import Completion, Failure
from inference_service.continuous_engine import ContinuousEngine
from inference_service.model import LoadedModel

POISON = 1
"""The token with an embedding that is not finite, as after an overflow or a bad resize."""
LINE = "the model's values are not finite in float32 for this request; look for NaN or infinity in its weights"


@pytest.fixture(scope="module")
def poisoned_model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = save_tiny(tmp_path_factory.mktemp("poison") / "qwen2", hf.Qwen2Config(**LAYERS_OF_TWO))
    model = load_tiny(path)
    # The self-test has passed, because it does not use this token.
    with torch.no_grad():
        model.model.get_input_embeddings().weight[POISON] = float("nan")
    return model


@pytest.fixture(scope="module", params=[True, False], ids=["packed", "one by one"])
def poisoned(request: pytest.FixtureRequest, poisoned_model: LoadedModel) -> LoadedModel:
    return replace(poisoned_model, packs=request.param)


def clean(seed: int, count: int) -> list[int]:
    return [token + (token == POISON) for token in tokens_of(seed, count)]


def with_poison(seed: int, count: int, place: int) -> list[int]:
    tokens = clean(seed, count)
    tokens[place % count] = POISON
    return tokens


_alone: dict[tuple[bool, tuple[int, ...], float], tuple[int, ...] | None] = {}


def alone(model: LoadedModel, tokens: Sequence[int], temperature: float) -> tuple[int, ...] | None:
    """The answer of a fresh engine to the request alone; none if the engine fails it."""
    key = (model.packs, tuple(tokens), temperature)
    if key not in _alone:
        one = ask("alone", tokens, 5, temperature=temperature, seed=7)
        (found,) = make_engine(model).run([one])
        _alone[key] = found.token_ids if isinstance(found, Completion) else None
    return _alone[key]


def unfinished_rows_are_finite(engine: ContinuousEngine) -> bool:
    """Check all rows, because nothing runs any more."""
    return bool(engine._runner.pool._memory.isfinite().all())


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1 << 30), rows=st.integers(1, 4), budget=st.sampled_from([0, 5, 16]), cached=st.booleans())
def test_only_the_poisoned_fail(poisoned: LoadedModel, seed: int, rows: int, budget: int, cached: bool) -> None:
    """Random mixes: prompts share prefixes and come in pieces, and rows are reused."""
    chance = random.Random(seed)
    cache = MemoryCache(poisoned.chunk_shape(CHUNK)) if cached else None
    engine = make_engine(poisoned, cache=cache, max_running=rows, step_prefill_tokens=budget)
    expected: dict[str, tuple[int, ...] | None] = {}
    done: list[Completion | Failure] = []
    for number in range(12):
        length, kind, temperature = chance.randint(1, 40), chance.randrange(4), chance.choice([0.0, 1.0])
        # Few seeds, so that prompts begin with each other's chunks.
        tokens = clean(kind, length) if chance.random() < 0.6 else with_poison(kind, length, chance.randrange(length))
        name = f"r{number}"
        expected[name] = None if POISON in tokens else alone(poisoned, tokens, temperature)
        engine.submit(ask(name, tokens, 5, temperature=temperature, seed=7), 0.0)
        for _ in range(chance.randrange(3)):
            done += engine.step()
    while engine.unfinished:
        done += engine.step()
    found = {one.request.request_id: one.token_ids if isinstance(one, Completion) else None for one in done}
    assert found == expected
    assert {one.reason for one in done if isinstance(one, Failure)} <= {LINE}
    assert unfinished_rows_are_finite(engine)
    # `MemoryCache` refuses chunks that are not finite. Its keys show that no chunk of the poisoned request was offered.
    assert cache is None or not any(POISON in tokens for _, tokens in cache.stored)


def test_a_short_one_beside_a_long_one_reads_nothing_of_who_was_there(poisoned: LoadedModel) -> None:
    engine = make_engine(poisoned, max_running=2)
    (failure,) = engine.run([ask("bad", with_poison(1, 50, 40), 4)])
    assert isinstance(failure, Failure)
    assert failure.reason == LINE
    short, long = clean(5, 6), clean(6, 55)
    found = answers(engine.run([ask("short", short, 5), ask("long", long, 5)]))
    assert {name: one.token_ids for name, one in found.items()} == {
        "short": alone(poisoned, short, 0.0),
        "long": alone(poisoned, long, 0.0),
    }


@pytest.mark.parametrize("deadline_ms", [None, 20.0])
def test_a_prompt_that_goes_in_its_pieces_leaves_nothing(poisoned: LoadedModel, deadline_ms: float | None) -> None:
    """A prompt ends at its deadline, or by a failing piece, which may have written values before it failed."""
    clock = ManualClock(0.0)
    engine = make_engine(poisoned, clock=clock, step_prefill_tokens=8, step_prefill_ms=0)
    forward = engine._runner.forward

    def failing(pieces: Sequence[Piece]) -> torch.Tensor:
        logits = forward(pieces)
        if deadline_ms is None and any(piece.end > 24 for piece in pieces):
            raise RuntimeError("out of memory")
        return logits

    engine._runner.forward = failing
    engine.submit(ask("bad", with_poison(2, 48, 40), 4, deadline_ms=deadline_ms), 0.0)
    done = []
    while engine.unfinished:
        clock.advance(5.0)
        done += engine.step()
    assert len(done) == 1
    assert unfinished_rows_are_finite(engine)


@pytest.mark.parametrize(("place", "stored"), [(20, 0), (26, 3)], ids=["of the prompt", "of the answer"])
def test_infinite_keys_that_no_logit_shows_fail_too(qwen2: LoadedModel, place: int, stored: int) -> None:
    """A key of minus infinity has no weight, so the logits stay finite, but the row would keep the key."""
    cache = MemoryCache(qwen2.chunk_shape(CHUNK))
    engine = make_engine(qwen2, cache=cache, max_running=2)
    forward = engine._runner.forward

    def overflowing(pieces: Sequence[Piece]) -> torch.Tensor:
        logits = forward(pieces)
        for piece in pieces:
            if piece.start <= place < piece.end:
                engine._runner.pool._memory[0, 0, piece.row, 0, place] = -torch.inf
        return torch.nan_to_num(logits)

    engine._runner.forward = overflowing
    (failure,) = engine.run([ask("bad", tokens_of(3, 24), 12)])
    assert isinstance(failure, Failure)
    assert failure.reason == LINE
    assert unfinished_rows_are_finite(engine)
    assert len(cache.stored) == stored


def test_warming_up_leaves_nothing(poisoned: LoadedModel) -> None:
    with torch.no_grad():
        weight = poisoned.model.get_input_embeddings().weight
        kept = weight[0].clone()
        weight[0] = float("nan")
        engine = make_engine(poisoned)
        engine.warm_up()
        weight[0] = kept
    assert unfinished_rows_are_finite(engine)


def test_the_line_names_a_dtype_that_helps(tmp_path: Path) -> None:
    save_tiny(tmp_path / "tiny", hf.Qwen2Config(**LAYERS_OF_TWO))
    model = load_tiny(tmp_path / "tiny")
    lines = {}
    for dtype in (torch.float16, torch.bfloat16):
        engine = make_engine(model)
        engine.chunk_shape = replace(engine.chunk_shape, dtype=dtype)
        lines[dtype] = str(engine._not_finite())
    assert lines[torch.float16].endswith("float16 for this request; load it with --dtype bfloat16 or float32")
    assert lines[torch.bfloat16].endswith("bfloat16 for this request; load it with --dtype float32")

"""Sampling: seeded by the request, the same alone and in company, after the distribution that `transformers` has."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engine_helpers import CHUNK, MemoryCache, answers, ask, make_engine, plain_answer, tokens_of

from core.records import Sampling
from inference_service.generation_defaults import seed_of
from inference_service.model import LoadedModel
from inference_service.sampling import BatchSampler, Draw, SequenceSampler

PROMPT = tokens_of(11, 19)
SEEDS = [6571135640840770423, 6148575346284461587, 7878416158528451816]


def draw(logits: Sequence[float], count: int, **sampling: Any) -> Counter[int | None]:
    """So many tokens of one answer, each from the same logits."""
    sampler = SequenceSampler(Sampling(**{"seed": 0, **sampling}))
    draws = [Draw(sampler, range(index)) for index in range(count)]
    return Counter(BatchSampler().sample(torch.tensor([logits]).repeat(count, 1), draws))


def test_a_seed_gives_one_answer_alone_and_in_company(model: LoadedModel) -> None:
    requests = [ask(f"s{seed}", PROMPT, 12, temperature=1.0, seed=seed) for seed in range(4)]
    greedy = [ask(f"g{seed}", tokens_of(seed, 9 + seed), 12) for seed in range(3)]
    alone = {one.request_id: answers(make_engine(model).run([one]))[one.request_id].token_ids for one in requests}
    engine = make_engine(model, cache=MemoryCache(model.chunk_shape(CHUNK)))
    for company in ([*greedy, *requests], [requests[3], greedy[0], requests[1], requests[0], requests[2]]):
        found = answers(engine.run(company))
        assert {name: found[name].token_ids for name in alone} == alone
    assert found["g0"].token_ids == plain_answer(model, tokens_of(0, 9), 12)
    assert len(set(alone.values())) == len(alone)


def test_without_a_seed_it_is_made_of_the_request_id(qwen2: LoadedModel) -> None:
    requests = [ask(name, PROMPT, 12, temperature=1.0) for name in ("a", "b", "c")]
    found = answers(make_engine(qwen2).run(requests))
    assert len({one.token_ids for one in found.values()}) == 3
    again = answers(make_engine(qwen2).run(reversed(requests)))
    assert {name: one.token_ids for name, one in again.items()} == {n: one.token_ids for n, one in found.items()}
    # What the answer says of its seed is what gives it again, under any id.
    said = found["b"].sampling.seed
    assert said == seed_of("b")
    assert answers(make_engine(qwen2).run([ask("z", PROMPT, 12, temperature=1.0, seed=said)]))["z"].token_ids == (
        found["b"].token_ids
    )


def test_the_seed_of_an_id_is_the_same_everywhere() -> None:
    """In another process and in a later version, so that a retried request answers the same."""
    assert [seed_of(name) for name in ("r-1", "r-2", "\ud800")] == SEEDS


def test_a_draw_does_not_touch_the_global_generator(qwen2: LoadedModel) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    make_engine(qwen2).run([ask("a", PROMPT, 3, temperature=1.0)])
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [1e-30, 5e-324, 1e-5])
def test_a_tiny_temperature_is_greedy(model: LoadedModel, temperature: float) -> None:
    found = answers(make_engine(model).run([ask("a", PROMPT, 12, temperature=temperature)]))
    assert found["a"].token_ids == plain_answer(model, PROMPT, 12)


@pytest.mark.parametrize(("temperature", "odds"), [(1.0, 3.0), (0.5, 9.0), (2.0, 3.0**0.5)])
def test_draws_follow_the_softmax(temperature: float, odds: float) -> None:
    count = 4000
    found = draw([0.0, 1.0986123, -200.0], count, temperature=temperature)
    share = odds / (1 + odds)
    # Four standard deviations of the binomial.
    assert abs(found[1] / count - share) < 4 * (share * (1 - share) / count) ** 0.5
    assert found[2] == 0


def test_temperature_0_is_the_largest_logit() -> None:
    assert draw([0.5, 2.0, 1.9], 10, temperature=0.0) == {1: 10}


def test_impossible_tokens_are_never_drawn() -> None:
    assert set(draw([float("-inf"), 0.0, float("-inf"), 0.0], 200, temperature=100.0)) == {1, 3}


def test_the_largest_seed_is_taken() -> None:
    even = [0.0] * 64
    assert draw(even, 50, temperature=1.0, seed=2**63 - 1) != draw(even, 50, temperature=1.0, seed=1)

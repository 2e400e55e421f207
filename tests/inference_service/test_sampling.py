"""Sampling: seeded by the request, the same alone and in company, after the right distribution."""

from collections import Counter

import pytest
import torch
from engine_helpers import CHUNK, MemoryCache, answers, ask, make_engine, plain_answer, tokens_of

from inference_service.model import LoadedModel
from inference_service.sampling import Sampler

PROMPT = tokens_of(11, 19)


def draw(logits: list[float], temperature: float, count: int, seed: int = 0) -> Counter[int]:
    sampler = Sampler(ask("a", [1], temperature=temperature, seed=seed))
    return Counter(sampler.sample(torch.tensor(logits)) for _ in range(count))


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


def test_a_draw_does_not_touch_the_global_generator(qwen2: LoadedModel) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    make_engine(qwen2).run([ask("a", PROMPT, 3, temperature=1.0)])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_tiny_temperature_is_greedy(model: LoadedModel) -> None:
    found = answers(make_engine(model).run([ask("a", PROMPT, 12, temperature=1e-30)]))
    assert found["a"].token_ids == plain_answer(model, PROMPT, 12)


@pytest.mark.parametrize(("temperature", "odds"), [(1.0, 3.0), (0.5, 9.0), (2.0, 3.0**0.5)])
def test_draws_follow_the_softmax(temperature: float, odds: float) -> None:
    count = 4000
    found = draw([0.0, 1.0986123, -200.0], temperature, count)
    share = odds / (1 + odds)
    # Four standard deviations of the binomial.
    assert abs(found[1] / count - share) < 4 * (share * (1 - share) / count) ** 0.5
    assert found[2] == 0


def test_temperature_0_is_the_largest_logit() -> None:
    assert draw([0.5, 2.0, 1.9], 0.0, 10) == {1: 10}


def test_impossible_tokens_are_never_drawn() -> None:
    assert set(draw([float("-inf"), 0.0, float("-inf"), 0.0], 100.0, 200)) == {1, 3}


def test_the_largest_seed_is_taken() -> None:
    assert draw([0.0, 0.0], 1.0, 50, seed=2**63 - 1) != draw([0.0, 0.0], 1.0, 50, seed=1)

"""Sampling: seeded by the request, the same alone and in company, after the distribution that `transformers` has."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from engine_helpers import CHUNK, MemoryCache, answers, ask, make_engine, plain_answer, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

from core.records import Sampling
from inference_service.generation_defaults import seed_of
from inference_service.model import LoadedModel
from inference_service.sampling import BLOCK, GROUP, BatchSampler, largest
from inference_service.sequence_sampler import PROPOSALS, Draw, SequenceSampler, TokenRules

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
    # The reported seed gives the same answer again, with any request id.
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


# Against the processors of `transformers`.

SAMPLINGS = st.builds(
    dict,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 3, 70]),
    top_p=st.sampled_from([1.0, 0.9, 0.4, 0.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.7]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5, -2.0]),
    logit_bias=st.sampled_from([{}, {}, {5: 3.0, 250: -100.0}, {7: 100.0}]),
    min_new_tokens=st.sampled_from([0, 2]),
)
RULES = st.builds(
    TokenRules,
    suppressed=st.sampled_from([(), (3, 8, 200)]),
    suppressed_first=st.sampled_from([(), (5, 9)]),
    forced_last=st.sampled_from([(), (7,), (6, 11)]),
)
NO_RULES = TokenRules()
END = (2, 4)
MOST_TOKENS = 5


@dataclass(frozen=True)
class Row:
    """One row of a pass, with what `transformers` draws it from."""

    draw: Draw
    logits: torch.Tensor
    """`[vocabulary]`, as the model gives them."""
    expected: torch.Tensor
    """`[vocabulary]` after the processors; minus infinity where a token is filtered out."""


class _Model:
    """What the choice of processors asks a model for."""

    config = hf.GPT2Config()
    _merge_criteria_processor_list = staticmethod(lambda processors, others: processors)


def made_row(
    vocabulary: int,
    *,
    seed: int,
    sampling: Sampling,
    spread: float = 1.0,
    rules: TokenRules = NO_RULES,
    output: int = 0,
) -> Row:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(vocabulary, generator=generator)
    prompt, answer = (torch.randint(0, vocabulary, (count,), generator=generator).tolist() for count in (9, output))
    sampler = SequenceSampler(sampling, rules, prompt=prompt, most_tokens=MOST_TOKENS, end_tokens=END)
    config = hf.GenerationConfig(
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature or None,
        top_k=sampling.top_k,
        top_p=sampling.top_p or 1e-9,
        min_p=sampling.min_p or None,
        min_new_tokens=sampling.min_new_tokens,
        suppress_tokens=list(rules.suppressed) or None,
        begin_suppress_tokens=list(rules.suppressed_first) or None,
        forced_eos_token_id=list(rules.forced_last) or None,
        max_length=len(prompt) + MOST_TOKENS,
    )
    config._eos_token_tensor = torch.tensor(END)
    processors = hf.GPT2LMHeadModel._get_logits_processor(
        _Model(), config, input_ids_seq_length=len(prompt), device="cpu"
    )
    ids = torch.tensor([prompt + answer])
    scores = logits[None].clone()
    if sampling.repetition_penalty != 1:
        scores = hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores)
    # As OpenAI's reference has it: mu[j] - c[j] * frequency - float(c[j] > 0) * presence.
    for token, count in Counter(answer).items():
        scores[0, token] -= count * sampling.frequency_penalty + sampling.presence_penalty
    for token, bias in sampling.logit_bias.items():
        scores[0, token] += bias
    expected = processors(ids, scores)[0]
    return Row(Draw(sampler, answer), logits, expected)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 1 << 30), st.sampled_from([0.1, 3.0]), SAMPLINGS, RULES, st.integers(0, 4)),
        min_size=1,
        max_size=6,
    ),
    vocabulary=st.sampled_from([258, 5 * BLOCK, 9 * BLOCK + 17]),
)
def test_every_token_is_drawn_as_transformers_would(rows: list[Any], vocabulary: int) -> None:
    """A greedy one is the largest, one after filters where the cumulated probabilities exceed the uniform number.

    Without filters it is one that is possible; its distribution has tests of its own.
    """
    made = [
        made_row(
            vocabulary, seed=seed, sampling=Sampling(**sampling, seed=seed), spread=spread, rules=rules, output=output
        )
        for seed, spread, sampling, rules, output in rows
    ]
    found = BatchSampler().sample(torch.stack([row.logits for row in made]), [row.draw for row in made])
    for token, row in zip(found, made, strict=True):
        assert token is not None
        forced = row.draw.sampler.forced(row.draw.index)
        if len(forced) > 1:
            # Their logits are equal: a filter keeps all of them, and that of `transformers` may drop some.
            assert token in forced
            continue
        assert row.expected[token] > -torch.inf
        if row.draw.sampler.greedy:
            assert token == int(row.expected.argmax())
        elif row.draw.sampler.filtered:
            cumulated = torch.softmax(row.expected.double(), -1).cumsum(-1)
            uniform = row.draw.sampler.uniforms(row.draw.index)[0, 0]
            before = float(cumulated[token - 1]) if token else 0.0
            assert before - 1e-5 <= uniform <= float(cumulated[token]) + 1e-5
    # Each request has the same answer alone, in another order, and in another batch.
    for token, row in zip(found, made, strict=True):
        assert BatchSampler().sample(row.logits[None].clone(), [row.draw]) == [token]
    turned = [*reversed(made), made_row(vocabulary, seed=1, sampling=Sampling(temperature=1.0, top_k=200))]
    again = BatchSampler().sample(torch.stack([row.logits for row in turned]), [row.draw for row in turned])
    assert again[:-1] == found[::-1]


def _peaked(logits: torch.Tensor) -> torch.Tensor:
    """One token of its group has all mass of it: the least favourable case for proposals."""
    logits[:] = -30.0
    logits[5::GROUP] = 0.0
    return logits


def _holed(logits: torch.Tensor) -> torch.Tensor:
    """Most tokens impossible, whole groups among them."""
    logits[torch.arange(len(logits)) % 7 != 2] = -torch.inf
    return logits


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("shape", [lambda logits: logits, torch.zeros_like, _peaked, _holed])
@pytest.mark.parametrize("vocabulary", [3, GROUP, 3 * GROUP, 9 * GROUP + 11])
def test_unfiltered_draws_follow_the_softmax_in_every_token(vocabulary: int, shape: Any, temperature: float) -> None:
    """Pearson's test: 6 standard deviations of its statistic would be passed by chance in one run of 10^8."""
    logits = shape(2 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)))
    if not torch.isfinite(logits).any():
        logits[0] = 0.0
    count = 6000
    found = draw(logits.tolist(), count, temperature=temperature, seed=9)
    expected = count * torch.softmax(logits.double() / temperature, -1)
    drawn = torch.tensor([found[token] for token in range(vocabulary)], dtype=torch.float64)
    assert drawn.sum() == count
    # The statistic needs expected counts that are not small: the unlikely tokens count as one.
    likely = expected >= 5
    drawn = torch.cat([drawn[likely], drawn[~likely].sum()[None]])
    expected = torch.cat([expected[likely], expected[~likely].sum()[None]])
    assert abs(float(drawn[-1] - expected[-1])) <= 6 * float(expected[-1]) ** 0.5 + 6
    statistic, freedom = float(((drawn - expected)[:-1] ** 2 / expected[:-1]).sum()), max(1, int(likely.sum()))
    assert statistic < freedom + 6 * (2 * freedom) ** 0.5 + 6


def test_a_row_without_a_taken_proposal_is_drawn_again_with_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = _peaked(torch.empty(3, 40 * GROUP)[0])[None].repeat(3, 1)
    draws = [Draw(SequenceSampler(Sampling(temperature=1.0, seed=seed)), range(seed)) for seed in range(3)]
    at_first = BatchSampler().sample(logits.clone(), draws)
    real = SequenceSampler.uniforms
    asked = []

    def refused_at_first(self: SequenceSampler, index: int, attempt: int = 0) -> Any:
        numbers = real(self, index, attempt)
        if index != 1:
            return numbers
        asked.append(attempt)
        # A proposal at the last position of a group, where the peak is not, is almost never accepted.
        return numbers if attempt == 2 else [[0.999] * PROPOSALS, [0.999] * PROPOSALS]

    monkeypatch.setattr(SequenceSampler, "uniforms", refused_at_first)
    found = BatchSampler().sample(logits.clone(), draws)
    assert asked == [0, 1, 2]
    assert found[::2] == at_first[::2]
    assert (found[1] or 0) % GROUP == 5


def test_the_numbers_of_a_token_are_the_same_in_any_order_and_no_two_are_alike() -> None:
    asked = [(index, attempt) for index in (0, 1, 15, 16, 40) for attempt in (0, 1)]
    forwards, backwards = (SequenceSampler(Sampling(seed=7)) for _ in range(2))
    found = {key: forwards.uniforms(*key).copy() for key in asked}
    assert all((backwards.uniforms(*key) == found[key]).all() for key in reversed(asked))
    numbers = [number for one in found.values() for number in one.flatten().tolist()]
    assert len(set(numbers)) == len(numbers) == len(asked) * 2 * PROPOSALS
    assert all(0 <= number < 1 for number in numbers)


@pytest.mark.parametrize("vocabulary", [5, 4 * BLOCK + 1, 152_064])
def test_the_largest_is_the_first_of_equals(vocabulary: int) -> None:
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(1)).round()
    logits[2] = 0.0
    tokens, greatest = largest(logits)
    assert tokens.tolist() == [row.tolist().index(max(row.tolist())) for row in logits]
    assert greatest.tolist() == logits.max(-1).values.tolist()


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-53])
def test_no_number_draws_a_token_without_probability(uniform: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a large vocabulary, with nothing at its beginning, its end and at whole blocks between.

    The first attempt has the number alone, later ones what is drawn.
    """
    vocabulary = 152_064 + 5
    logits = torch.full((4, vocabulary), -torch.inf)
    possible = torch.arange(3 * BLOCK + 7, vocabulary - BLOCK, 1 + 2 * BLOCK)
    logits[:, possible] = torch.randn(4, len(possible), generator=torch.Generator().manual_seed(2))
    real = SequenceSampler.uniforms
    monkeypatch.setattr(
        SequenceSampler,
        "uniforms",
        lambda self, index, attempt=0: real(self, index, attempt) if attempt else np.full((2, PROPOSALS), uniform),
    )
    samplings = [
        Sampling(temperature=t, top_p=p, seed=0) for t, p in ((1.0, 1.0), (50.0, 1.0), (1.0, 0.9), (1e-5, 1.0))
    ]
    draws = [Draw(SequenceSampler(sampling), ()) for sampling in samplings]
    tokens = BatchSampler().sample(logits.clone(), draws)
    assert set(tokens) <= set(possible.tolist())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_that_is_not_finite_has_no_token_and_changes_no_other(value: float, dtype: torch.dtype) -> None:
    samplings = [
        Sampling(),
        Sampling(temperature=1.0, seed=3),
        Sampling(temperature=1.0, top_p=0.5, seed=3),
        Sampling(temperature=0.5, top_k=4, seed=3),
        Sampling(repetition_penalty=1.2),
    ]
    rules = TokenRules(forced_last=(7,))
    for vocabulary in (258, 9 * BLOCK):
        logits = torch.randn(len(samplings), vocabulary, generator=torch.Generator().manual_seed(4)).to(dtype)
        draws = [Draw(SequenceSampler(one, prompt=(1, 2)), ()) for one in samplings]
        draws.append(Draw(SequenceSampler(Sampling(), rules, most_tokens=1), ()))
        clean = torch.cat([logits, logits[:1]])
        right = BatchSampler().sample(clean.clone(), draws)
        assert right[-1] == 7
        for row in range(len(draws)):
            for bad in ([100], list(range(vocabulary))):
                poisoned = clean.clone()
                poisoned[row, bad] = value
                found = BatchSampler().sample(poisoned, draws)
                assert found == [None if index == row else token for index, token in enumerate(right)]


def test_impossible_tokens_do_not_make_a_row_fail() -> None:
    logits = torch.full((2, 300), -torch.inf)
    logits[0, 9] = 1.0
    draws = [Draw(SequenceSampler(Sampling()), ())] * 2
    assert BatchSampler().sample(logits, draws) == [9, None]

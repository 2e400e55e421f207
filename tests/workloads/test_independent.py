import statistics
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.default_slot import default_slot
from core.errors import UserError
from workloads.config import Arrivals, IndependentConfig, WorkloadConfig
from workloads.independent import IndependentWorkload
from workloads.timed_request import TimedRequest


def workload(requests: int = 200, seed: int = 5, max_new_tokens: int = 64, **options: Any) -> IndependentWorkload:
    return IndependentWorkload(
        WorkloadConfig(
            workload="independent",
            requests=requests,
            seed=seed,
            max_new_tokens=max_new_tokens,
            independent=IndependentConfig(**options),
        )
    )


def lengths(load: list[TimedRequest]) -> list[int]:
    return [len(timed.prompt_token_ids or ()) for timed in load]


def test_requests_share_neither_session_nor_user_nor_tokens() -> None:
    load = list(workload())
    assert len({timed.session_id for timed in load}) == len({timed.user_id for timed in load}) == len(load)
    assert len({(timed.prompt_token_ids or ())[:16] for timed in load}) == len(load)
    assert len({timed.request_id for timed in load}) == len(load)


def test_the_seed_decides_all_and_iterating_again_begins_anew() -> None:
    one = workload(length_cv=0.7)
    first = list(one)
    assert list(one) == first
    other = list(workload(length_cv=0.7, seed=6))
    assert [timed.prompt_token_ids for timed in other] != [timed.prompt_token_ids for timed in first]
    assert [timed.at_ms for timed in other] != [timed.at_ms for timed in first]


def test_another_rate_is_the_same_requests_at_other_times() -> None:
    slow, fast = list(workload(rate_per_s=2.0)), list(workload(rate_per_s=8.0))
    assert [timed.prompt_token_ids for timed in slow] == [timed.prompt_token_ids for timed in fast]
    assert [timed.at_ms for timed in fast] == pytest.approx([timed.at_ms / 4 for timed in slow])


def test_even_arrivals_are_exactly_the_rate_apart() -> None:
    load = list(workload(requests=4, rate_per_s=4.0, arrivals=Arrivals.EVEN))
    assert [timed.at_ms for timed in load] == [0.0, 250.0, 500.0, 750.0]


def test_poisson_arrivals_have_the_mean_and_the_spread_of_exponential_gaps() -> None:
    times = [timed.at_ms for timed in workload(requests=4001, rate_per_s=10.0, prompt_tokens=1)]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(100.0, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(100.0, rel=0.1)


def test_without_variation_all_lengths_are_the_means() -> None:
    load = list(workload(prompt_tokens=100, answer_tokens=7))
    assert set(lengths(load)) == {100}
    assert {timed.max_new_tokens for timed in load} == {7}


def test_lengths_have_the_mean_and_variation_that_were_asked_for() -> None:
    load = list(workload(requests=4000, prompt_tokens=200, answer_tokens=20, length_cv=0.5, max_new_tokens=1000))
    assert statistics.mean(lengths(load)) == pytest.approx(200, rel=0.05)
    assert statistics.stdev(lengths(load)) == pytest.approx(100, rel=0.1)
    answers = [timed.max_new_tokens for timed in load]
    assert statistics.mean(answers) == pytest.approx(20, rel=0.05)


@settings(max_examples=25)
@given(cv=st.floats(0, 10), prompt=st.integers(1, 1920), answer=st.integers(1, 64), seed=st.integers(0, 2**63 - 1))
def test_no_length_is_outside_its_limits(cv: float, prompt: int, answer: int, seed: int) -> None:
    load = list(workload(requests=20, seed=seed, length_cv=cv, prompt_tokens=prompt, answer_tokens=answer))
    assert all(1 <= length <= 1920 for length in lengths(load))
    assert all(1 <= timed.max_new_tokens <= 64 for timed in load)


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 6, 12])
def test_home_slots_take_turns_and_so_do_those_of_each_divisor(slots: int) -> None:
    load = list(workload(requests=48, even_over=12))
    assert [default_slot(timed.session_id, slots) for timed in load] == [index % slots for index in range(48)]


def test_a_mean_above_its_limit_is_refused() -> None:
    with pytest.raises(UserError, match="--prompt-tokens: a mean of 2000 is above --max-prompt-tokens, 1920"):
        workload(prompt_tokens=2000)
    with pytest.raises(UserError, match="--answer-tokens: a mean of 65 is above --max-new-tokens, 64"):
        workload(answer_tokens=65)

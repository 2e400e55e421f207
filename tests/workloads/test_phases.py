from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UserError
from workloads.config import PhasesConfig, WorkloadConfig
from workloads.phases import PhasesWorkload, phase_of
from workloads.timed_request import TimedRequest

USERS = (3, 8, 25, 40, 5)
BORDERS = (0, 15, 35, 55, 75, 100)


def load(requests: int, seed: int = 7, **options: Any) -> list[TimedRequest]:
    return list(PhasesWorkload(WorkloadConfig(requests=requests, seed=seed, phases=PhasesConfig(**options))))


def user_number(timed: TimedRequest) -> int:
    return int(timed.user_id.removeprefix("user-"))


@pytest.mark.parametrize(
    ("index", "requests", "users"),
    [
        (0, 1, 3), (14, 100, 3), (15, 100, 8), (34, 100, 8), (35, 100, 25), (54, 100, 25), (55, 100, 40),
        (74, 100, 40), (75, 100, 5), (99, 100, 5), (29, 200, 3), (30, 200, 8), (1, 7, 3), (2, 7, 8),
    ],
)  # fmt: skip
def test_a_phase_ends_at_its_share_of_the_requests(index: int, requests: int, users: int) -> None:
    assert phase_of(index, requests).users == users


@given(requests=st.integers(min_value=1, max_value=500))
def test_phases_follow_each_other_in_order_for_any_number_of_requests(requests: int) -> None:
    seen = [USERS.index(phase_of(index, requests).users) for index in range(requests)]
    assert seen == sorted(seen)


def test_each_phase_has_exactly_its_users() -> None:
    requests = load(10_000)
    for users, (begin, end) in zip(USERS, pairwise(BORDERS), strict=True):
        phase = requests[begin * 100 : end * 100]
        assert {user_number(timed) for timed in phase} == set(range(1, users + 1))


def test_in_a_small_population_four_fifths_go_to_the_first_three_fifths() -> None:
    requests = load(10_000)
    for begin, end, favoured in ((0, 15, 2), (75, 100, 3)):
        phase = requests[begin * 100 : end * 100]
        share = sum(user_number(timed) <= favoured for timed in phase) / len(phase)
        # Four standard deviations of 1500 draws of 0.8.
        assert share == pytest.approx(0.8, abs=0.042)


@pytest.mark.parametrize(("begin", "end", "users"), [(15, 35, 8), (35, 55, 25), (55, 75, 40)])
def test_in_a_large_population_nobody_is_favoured(begin: int, end: int, users: int) -> None:
    counts = Counter(user_number(timed) for timed in load(20_000)[begin * 200 : end * 200])
    expected = (end - begin) * 200 / users
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_intervals_are_half_and_in_the_last_two_phases_a_third_of_the_base() -> None:
    requests = load(100, base_interval_ms=600.0)
    intervals = [after.at_ms - before.at_ms for before, after in pairwise(requests)]
    assert requests[0].at_ms == 0.0
    assert intervals == pytest.approx([300.0] * 55 + [200.0] * 44)


def test_ids_are_stable_and_name_workload_seed_and_index() -> None:
    requests = load(300, seed=5)
    assert [timed.request_id for timed in requests[:2]] == ["phases-5-000000", "phases-5-000001"]
    assert len({timed.request_id for timed in requests}) == 300
    assert all(timed.session_id.startswith(timed.user_id + "/s") for timed in requests)
    assert {timed.user_id for timed in requests[:45]} == {"user-01", "user-02", "user-03"}


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(min_value=0, max_value=1000),
    max_prompt_tokens=st.integers(min_value=200, max_value=800),
    sessions_per_user=st.integers(min_value=1, max_value=3),
)
def test_sessions_are_growing_prefixes_within_the_limit(
    seed: int, max_prompt_tokens: int, sessions_per_user: int
) -> None:
    options = PhasesConfig(system_prompt_tokens=100, turn_tokens=40, sessions_per_user=sessions_per_user)
    config = WorkloadConfig(requests=200, seed=seed, max_prompt_tokens=max_prompt_tokens, phases=options)
    workload = PhasesWorkload(config)
    sessions: dict[str, list[str]] = defaultdict(list)
    for timed in workload:
        assert timed.prompt is not None
        assert len(timed.prompt.encode()) <= max_prompt_tokens
        sessions[timed.session_id].append(timed.prompt)
    system = {prompts[0][:100] for prompts in sessions.values()}
    assert len(system) == 1
    for prompts in sessions.values():
        assert all(after.startswith(before) for before, after in pairwise(prompts))
        assert prompts[0].count("User: ") == 1
    restarted = [session for session in sessions if session.count("-") == 2]
    assert workload.adjustments() == {"restarted_sessions": len(restarted)}
    numbers = {session.split("/s")[1].split("-")[0] for session in sessions}
    assert numbers <= set(map(str, range(1, sessions_per_user + 1)))


def test_a_conversation_that_has_grown_too_long_is_followed_by_numbered_fresh_ones() -> None:
    sessions = list(dict.fromkeys(timed.session_id for timed in load(1000, sessions_per_user=1)))
    first_user = [session for session in sessions if session.startswith("user-01/")]
    assert first_user[:3] == ["user-01/s1", "user-01/s1-2", "user-01/s1-3"]


def test_the_seed_decides_everything_and_iterating_again_begins_anew() -> None:
    workload = PhasesWorkload(WorkloadConfig(requests=50, seed=1))
    assert list(workload) == list(workload) == load(50, seed=1)
    assert [timed.prompt for timed in load(50, seed=1)] != [timed.prompt for timed in load(50, seed=2)]
    assert [timed.user_id for timed in load(50, seed=1)] != [timed.user_id for timed in load(50, seed=2)]


def test_becomes_a_request_once_its_time_is_known() -> None:
    timed = load(1)[0]
    request = timed.created(1234.5)
    assert (request.created_at_ms, request.prompt, request.session_id) == (1234.5, timed.prompt, timed.session_id)


def test_a_limit_that_holds_no_turn_is_refused_with_the_least_that_does() -> None:
    config = WorkloadConfig(max_prompt_tokens=300)
    with pytest.raises(UserError, match=r"--max-prompt-tokens: 300 .* at least (\d+)") as refused:
        PhasesWorkload(config)
    least = int(str(refused.value).split("at least ")[1].split(",")[0])
    assert len(list(PhasesWorkload(config.model_copy(update={"max_prompt_tokens": least})))) == 200

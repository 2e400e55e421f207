from pathlib import Path
from typing import Any

import pytest

from core.errors import UserError
from workloads.burstgpt import BurstGPTWorkload
from workloads.config import (
    BadRows,
    BurstGPTConfig,
    FailedCalls,
    LongPrompts,
    TraceConfig,
    WorkloadConfig,
)
from workloads.timed_request import TimedRequest


def replay(
    trace: Path,
    *,
    requests: int = 300,
    seed: int = 3,
    limit: int = 1920,
    failed_calls: FailedCalls = FailedCalls.SKIP,
    **options: Any,
) -> BurstGPTWorkload:
    return BurstGPTWorkload(
        WorkloadConfig(
            workload="burstgpt",
            requests=requests,
            seed=seed,
            max_prompt_tokens=limit,
            replay=TraceConfig(trace=trace, **options),
            burstgpt=BurstGPTConfig(failed_calls=failed_calls),
        )
    )


def prompts(load: list[TimedRequest]) -> list[tuple[int, ...]]:
    return [timed.prompt_token_ids or () for timed in load]


def test_the_made_trace_in_full(made_burstgpt_trace: Path) -> None:
    workload = replay(made_burstgpt_trace, limit=400, time_scale=2.0)
    load = list(workload)
    assert [timed.at_ms for timed in load] == [0.0, 20_000.0]
    assert [len(prompt) for prompt in prompts(load)] == [30, 1]
    assert [timed.max_new_tokens for timed in load] == [1, 14]
    assert [timed.request_id for timed in load] == ["burstgpt-3-000000", "burstgpt-3-000001"]
    assert [timed.session_id for timed in load] == ["user-000001/s1", "user-000002/s1"]
    assert workload.adjustments() == {
        "skipped_long_prompts": 1,
        "cut_long_prompts": 0,
        "skipped_bad_rows": 0,
        "skipped_failed_calls": 1,
        "kept_failed_calls": 0,
    }


def test_failed_calls_are_requests_by_option(made_burstgpt_trace: Path) -> None:
    workload = replay(made_burstgpt_trace, failed_calls=FailedCalls.KEEP, long_prompts=LongPrompts.CUT, limit=400)
    load = list(workload)
    assert [(len(timed.prompt_token_ids or ()), timed.max_new_tokens) for timed in load] == [
        (30, 1), (1, 1), (1, 14), (400, 17),
    ]  # fmt: skip
    counts = workload.adjustments()
    assert (counts["kept_failed_calls"], counts["skipped_failed_calls"], counts["cut_long_prompts"]) == (1, 0, 1)


def test_the_prompts_of_a_session_are_beginnings_of_one_stream(made_burstgpt_sessions: Path) -> None:
    load = list(replay(made_burstgpt_sessions))
    first, other, longer, lone, alone, shorter, again = prompts(load)
    assert [len(prompt) for prompt in (first, longer, shorter, again)] == [20, 50, 30, 30]
    assert longer[:20] == first
    assert longer[:30] == shorter == again
    # What shares nothing may begin with a few equal tokens by chance, not with 8 of them.
    assert len({prompt[:8] for prompt in (first, other, lone, alone)}) == 4
    assert [timed.session_id for timed in load] == [
        "user-trace-7/s1", "user-trace-8/s1", "user-trace-7/s1", "user-000004/s1", "user-000005/s1",
        "user-trace-7/s1", "user-trace-7/s1",
    ]  # fmt: skip


def test_a_cut_prompt_is_still_the_beginning_of_its_session(made_burstgpt_sessions: Path) -> None:
    whole = prompts(list(replay(made_burstgpt_sessions)))
    cut = prompts(list(replay(made_burstgpt_sessions, limit=25, long_prompts=LongPrompts.CUT)))
    assert cut == [prompt[:25] for prompt in whole]


def test_the_seed_decides_the_tokens_and_iterating_again_begins_anew(made_burstgpt_sessions: Path) -> None:
    workload = replay(made_burstgpt_sessions, requests=3)
    first, counts = list(workload), workload.adjustments()
    assert len(first) == 3
    assert (list(workload), workload.adjustments()) == (first, counts)
    assert not set(prompts(first)) & set(prompts(list(replay(made_burstgpt_sessions, seed=4))))


def test_bad_rows_are_left_out_by_option(made_burstgpt_trace: Path) -> None:
    with made_burstgpt_trace.open("a") as trace:
        trace.write("117,ChatGPT,472,18,490,API log\n")
    workload = replay(made_burstgpt_trace, bad_rows=BadRows.SKIP)
    assert len(list(workload)) == 3
    assert workload.adjustments()["skipped_bad_rows"] == 1
    with pytest.raises(UserError, match="line 6: Timestamp: 117 is before the row above's 118; sort the trace"):
        list(replay(made_burstgpt_trace))


def test_a_missing_trace_is_refused() -> None:
    with pytest.raises(UserError, match="--trace: the burstgpt workload replays a trace; give its path"):
        BurstGPTWorkload(WorkloadConfig(workload="burstgpt"))

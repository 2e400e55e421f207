from pathlib import Path
from typing import Any

import pytest

from core.errors import UserError
from workloads.azure import AzureWorkload
from workloads.azure_trace import read_azure_trace
from workloads.config import LongPrompts, TraceConfig, WorkloadConfig


def replay(
    trace: Path, *, requests: int = 300, limit: int = 1920, scale: float = 0.0625, **options: Any
) -> AzureWorkload:
    return AzureWorkload(
        WorkloadConfig(
            workload="azure",
            requests=requests,
            seed=3,
            max_prompt_tokens=limit,
            replay=TraceConfig(trace=trace, prompt_scale=scale, **options),
        )
    )


def test_the_made_trace_in_full(made_azure_trace: Path) -> None:
    workload = replay(made_azure_trace, limit=400, time_scale=2.0)
    load = list(workload)
    assert [timed.at_ms for timed in load] == [0.0, 0.0, 2000.0]
    assert [len(timed.prompt_token_ids or ()) for timed in load] == [23, 1, 100]
    assert [timed.max_new_tokens for timed in load] == [3, 1, 32]
    assert [timed.request_id for timed in load] == ["azure-3-000000", "azure-3-000001", "azure-3-000002"]
    assert len({timed.session_id for timed in load}) == 3
    assert workload.adjustments() == {"skipped_long_prompts": 1, "cut_long_prompts": 0, "skipped_bad_rows": 0}


def test_long_prompts_are_cut_to_the_limit_by_option(made_azure_trace: Path) -> None:
    workload = replay(made_azure_trace, limit=400, long_prompts=LongPrompts.CUT)
    assert [len(timed.prompt_token_ids or ()) for timed in workload] == [23, 1, 400, 100]
    assert workload.adjustments() == {"skipped_long_prompts": 0, "cut_long_prompts": 1, "skipped_bad_rows": 0}


def test_every_arrival_and_length_is_the_trace_s_scaled(any_azure_trace: Path) -> None:
    rows = [row for _, row in zip(range(300), read_azure_trace(any_azure_trace), strict=False)]
    load = list(replay(any_azure_trace, limit=1 << 18, scale=0.5, output_scale=0.25, time_scale=10.0))
    assert len(load) == len(rows)
    for row, timed in zip(rows, load, strict=True):
        assert len(timed.prompt_token_ids or ()) == max(1, round(row.prompt_tokens / 2))
        assert timed.max_new_tokens == min(max(1, round(row.answer_tokens / 4)), 32)
        assert timed.at_ms == pytest.approx((row.timestamp - rows[0].timestamp).total_seconds() * 100)


def test_iterating_again_begins_anew_and_stops_where_it_should(any_azure_trace: Path) -> None:
    workload = replay(any_azure_trace, requests=2)
    first, counts = list(workload), workload.adjustments()
    assert len(first) == 2
    assert (list(workload), workload.adjustments()) == (first, counts)


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--trace: the azure workload replays a trace; give its path"):
        AzureWorkload(WorkloadConfig(workload="azure"))
    with pytest.raises(UserError, match=r"--trace: .* is not a file"):
        replay(tmp_path)

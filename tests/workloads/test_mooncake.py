from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.errors import UserError
from workloads.config import LongPrompts, TraceConfig, WorkloadConfig
from workloads.mooncake import MooncakeWorkload, PrefixSessions
from workloads.mooncake_trace import read_trace


def replay(trace: Path, *, requests: int = 400, seed: int = 3, limit: int = 1920, **options: Any) -> MooncakeWorkload:
    return MooncakeWorkload(
        WorkloadConfig(
            workload="mooncake",
            requests=requests,
            seed=seed,
            max_prompt_tokens=limit,
            replay=TraceConfig(trace=trace, **options),
        )
    )


def common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def test_prompts_share_exactly_what_the_trace_shares(any_trace: Path) -> None:
    rows = list(read_trace(any_trace))[:60]
    replayed = list(replay(any_trace, requests=len(rows), limit=1 << 18))
    for row, timed in zip(rows, replayed, strict=False):
        for other_row, other in zip(rows, replayed, strict=False):
            shared = common(row.hash_ids, other_row.hash_ids)
            assert timed.prompt_token_ids is not None
            assert other.prompt_token_ids is not None
            whole = min(shared * 32, len(timed.prompt_token_ids), len(other.prompt_token_ids))
            assert timed.prompt_token_ids[:whole] == other.prompt_token_ids[:whole]
            if shared < min(len(row.hash_ids), len(other_row.hash_ids)):
                # A differing block may begin with the same few tokens by chance, not with 16 of them.
                assert common(timed.prompt_token_ids, other.prompt_token_ids) < whole + 16


def test_lengths_are_scaled_and_a_partial_last_block_in_proportion(any_trace: Path) -> None:
    rows = list(read_trace(any_trace))[:300]
    for row, timed in zip(rows, replay(any_trace, requests=300, limit=1 << 18), strict=True):
        whole, rest = divmod(row.input_length, 512)
        assert timed.prompt_token_ids is not None
        assert len(timed.prompt_token_ids) == whole * 32 + (max(1, rest // 16) if rest else 0)
        assert timed.max_new_tokens == min(max(1, round(row.output_length / 16)), 32)


def test_the_made_trace_in_full(made_trace: Path) -> None:
    workload = replay(made_trace, time_scale=2.0)
    requests = list(workload)
    assert [timed.at_ms for timed in requests] == [0.0, 0.0, 1500.0, 1500.0, 4500.25, 7500.0]
    assert [len(timed.prompt_token_ids or ()) for timed in requests] == [43, 93, 64, 97, 160, 1]
    assert [timed.max_new_tokens for timed in requests] == [6, 1, 32, 3, 1, 1]
    assert [timed.user_id for timed in requests] == [
        "user-000001", "user-000002", "user-000003", "user-000003", "user-000003", "user-000005",
    ]  # fmt: skip
    assert [timed.request_id for timed in requests][-1] == "mooncake-3-000005"
    assert workload.adjustments() == {"skipped_long_prompts": 1, "cut_long_prompts": 0, "skipped_bad_rows": 0}


def test_long_prompts_are_cut_to_whole_blocks_by_option(any_trace: Path) -> None:
    whole = list(replay(any_trace, requests=300, limit=1 << 18))
    workload = replay(any_trace, requests=300, limit=100, long_prompts=LongPrompts.CUT)
    cut = 0
    for full, timed in zip(whole, workload, strict=True):
        assert full.prompt_token_ids is not None
        if len(full.prompt_token_ids) > 100:
            cut += 1
            assert timed.prompt_token_ids == full.prompt_token_ids[:96]
        else:
            assert timed.prompt_token_ids == full.prompt_token_ids
    assert cut > 0
    assert workload.adjustments() == {"skipped_long_prompts": 0, "cut_long_prompts": cut, "skipped_bad_rows": 0}


def test_skipping_leaves_out_exactly_the_long_ones_and_keeps_their_sessions(any_trace: Path) -> None:
    whole = list(replay(any_trace, requests=300, limit=1 << 18))
    fitting = [timed for timed in whole if len(timed.prompt_token_ids or ()) <= 100]
    workload = replay(any_trace, requests=len(fitting), limit=100)
    kept = list(workload)
    described = [(timed.at_ms, timed.session_id, timed.prompt_token_ids) for timed in kept]
    assert described == [(timed.at_ms, timed.session_id, timed.prompt_token_ids) for timed in fitting]
    assert workload.adjustments()["skipped_long_prompts"] > 0


def test_a_continued_session_extends_all_whole_blocks_of_an_earlier_request(any_trace: Path) -> None:
    rows = list(read_trace(any_trace))[:1500]
    sessions = PrefixSessions(shared_blocks=1)
    ends: dict[int, set[tuple[int, ...]]] = {}
    for row in rows:
        blocks = row.hash_ids[: row.input_length // 512]
        session = sessions.of(blocks)
        if session in ends:
            assert any(len(end) > 1 and blocks[: len(end)] == end for end in ends[session])
        else:
            extended = {end for group in ends.values() for end in group if len(end) > 1 and blocks[: len(end)] == end}
            assert not extended
        ends.setdefault(session, set()).add(blocks)
    assert 1 < len(ends) < len(rows)


def test_only_so_many_ends_are_remembered_and_the_longest_idle_is_forgotten() -> None:
    sessions = PrefixSessions(shared_blocks=0, remembered=2)
    assert [sessions.of([block]) for block in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 4]


def test_the_seed_decides_the_tokens_and_iterating_again_begins_anew(any_trace: Path) -> None:
    workload = replay(any_trace, requests=50)
    first, counts = list(workload), workload.adjustments()
    assert list(workload) == first
    assert workload.adjustments() == counts
    other = [timed.prompt_token_ids for timed in replay(any_trace, requests=50, seed=4)]
    assert all(timed.prompt_token_ids != tokens for timed, tokens in zip(first[:5], other, strict=False))


def test_the_limit_on_requests_stops_before_a_bad_row(write_trace: Callable[..., Path]) -> None:
    row = {"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [0]}
    assert len(list(replay(write_trace([row, row, "broken"]), requests=2))) == 2


def test_contradicting_options_are_refused(made_trace: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--trace: the mooncake workload replays a trace; give its path"):
        MooncakeWorkload(WorkloadConfig(workload="mooncake"))
    with pytest.raises(UserError, match=r"--trace: .* is not a file"):
        replay(tmp_path)
    with pytest.raises(UserError, match="--max-prompt-tokens: 31 does not hold one block"):
        replay(made_trace, limit=31)

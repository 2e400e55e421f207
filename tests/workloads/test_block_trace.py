from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from core.errors import UserError
from workloads.azure_trace import read_azure_trace
from workloads.block_trace import BlockRequest, TraceFormat, read_blocks
from workloads.config import BadRows, FailedCalls
from workloads.mooncake_trace import read_trace


def assert_well_formed(requests: list[BlockRequest]) -> None:
    before: dict[int, tuple[int, ...]] = {}
    for request in requests:
        assert request.tokens >= 1
        assert len(request.blocks) == -(-request.tokens // request.block_tokens)
        for at, block in enumerate(request.blocks):
            # An equal id is an equal prefix.
            assert before.setdefault(block, request.blocks[:at]) == request.blocks[:at]


def test_a_mooncake_trace_is_read_as_it_is(any_trace: Path) -> None:
    rows = list(read_trace(any_trace))
    requests = list(read_blocks(any_trace, TraceFormat.MOONCAKE))
    assert_well_formed(requests)
    assert requests == [
        BlockRequest(row.timestamp - rows[0].timestamp, row.hash_ids, row.input_length, 512) for row in rows
    ]


def test_scaling_a_mooncake_trace_keeps_its_blocks(made_trace: Path) -> None:
    requests = list(read_blocks(made_trace, TraceFormat.MOONCAKE, time_scale=2.0, length_scale=1 / 16, block_tokens=7))
    assert_well_formed(requests)
    assert [request.at_ms for request in requests][3:5] == [1500.0, 4500.25]
    assert [(request.tokens, request.block_tokens) for request in requests] == [
        (43, 32), (93, 32), (64, 32), (97, 32), (160, 32), (3200, 32), (1, 32),
    ]  # fmt: skip
    assert [request.blocks for request in requests] == [row.hash_ids for row in read_trace(made_trace)]


def test_an_azure_trace_shares_nothing(any_azure_trace: Path) -> None:
    requests = list(read_blocks(any_azure_trace, TraceFormat.AZURE, length_scale=0.5, block_tokens=100))
    assert_well_formed(requests)
    blocks = [block for request in requests for block in request.blocks]
    assert len(set(blocks)) == len(blocks)
    assert [request.tokens for request in requests] == [
        max(1, round(row.prompt_tokens / 2)) for row in read_azure_trace(any_azure_trace)
    ]


def test_the_turns_of_a_burstgpt_session_share_what_their_lengths_allow(made_burstgpt_sessions: Path) -> None:
    requests = list(read_blocks(made_burstgpt_sessions, TraceFormat.BURSTGPT, block_tokens=300))
    assert_well_formed(requests)
    assert [request.at_ms for request in requests] == [0, 1000, 2500, 3000, 3000, 4500, 6000]
    assert [request.tokens for request in requests] == [320, 320, 800, 320, 320, 480, 480]
    first, other, longer, lone, alone, shorter, again = (request.blocks for request in requests)
    assert len(longer) == 3
    # Whole blocks are shared. A partial one is equal where it holds as much, and the whole one is another.
    assert first[0] == longer[0] == shorter[0]
    assert len({first[1], longer[1], shorter[1]}) == 3
    assert again == shorter
    assert len({*other, *lone, *alone, *first}) == 8


@pytest.mark.parametrize("block_tokens", [1, 64, 160, 10_000])
def test_blocks_of_a_session_fit_whatever_their_length(made_burstgpt_sessions: Path, block_tokens: int) -> None:
    requests = list(read_blocks(made_burstgpt_sessions, TraceFormat.BURSTGPT, block_tokens=block_tokens))
    assert_well_formed(requests)
    assert all(0 <= block < 1 << 63 for request in requests for block in request.blocks)


def test_failed_calls_and_bad_rows_are_counted(made_burstgpt_sessions: Path) -> None:
    with made_burstgpt_sessions.open("a") as trace:
        trace.write("12.0,7,3.5,ChatGPT,minus,40,520,Conversation log\n")
    options: dict[str, Any] = {"bad_rows": BadRows.SKIP}
    counts = Counter[str]()
    assert len(list(read_blocks(made_burstgpt_sessions, TraceFormat.BURSTGPT, counts=counts, **options))) == 7
    assert counts == {"skipped_failed_calls": 1, "skipped_bad_rows": 1}
    options["failed_calls"] = FailedCalls.KEEP
    assert [request.tokens for request in read_blocks(made_burstgpt_sessions, TraceFormat.BURSTGPT, **options)][5] == 1
    with pytest.raises(UserError, match="line 10: Request tokens: Input should be a valid integer"):
        list(read_blocks(made_burstgpt_sessions, TraceFormat.BURSTGPT))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"time_scale": 0.0}, "time_scale: 0.0 is not a number above 0"),
        ({"length_scale": float("nan")}, "length_scale: nan is not"),
        ({"block_tokens": -1}, "block_tokens: -1 is not"),
    ],
)
def test_a_scale_that_is_none_is_refused_at_once(made_trace: Path, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        read_blocks(made_trace, TraceFormat.MOONCAKE, **options)

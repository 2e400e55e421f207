from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from core.errors import UserError
from workloads.config import BadRows, MooncakeConfig, TimeUnit, TraceConfig, WorkloadConfig
from workloads.mooncake import MooncakeWorkload
from workloads.mooncake_trace import TraceForm, read_trace
from workloads.trace_rows import MAX_LINE_BYTES

GOOD = {"timestamp": 5, "input_length": 600, "output_length": 3, "hash_ids": [0, 1]}


def without(field: str) -> dict[str, object]:
    return {name: value for name, value in GOOD.items() if name != field}


def test_every_row_is_read_in_order(any_trace: Path) -> None:
    rows = list(read_trace(any_trace))
    assert len(rows) == sum(1 for _ in any_trace.open())
    assert all(before.timestamp <= after.timestamp for before, after in pairwise(rows))
    assert all(len(row.hash_ids) == -(-row.input_length // 512) for row in rows)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (without("hash_ids"), "hash_ids: missing"),
        (without("timestamp"), "timestamp: missing"),
        (GOOD | {"input_length": "600"}, "input_length: Input should be a valid integer"),
        (GOOD | {"output_length": 3.5}, "output_length: Input should be a valid integer"),
        (GOOD | {"hash_ids": [0, "1"]}, "hash_ids.1: Input should be a valid integer"),
        (GOOD | {"timestamp": True}, "timestamp: Input should be a valid number"),
        (GOOD | {"input_length": -600}, "input_length: Input should be greater than or equal to 1"),
        (GOOD | {"output_length": -1}, "output_length: Input should be greater than or equal to 0"),
        (GOOD | {"hash_ids": [0, -1]}, "hash_ids.1: Input should be greater than or equal to 0"),
        (GOOD | {"timestamp": 4}, "timestamp: 4 is before the row above's 5; sort the trace"),
        (GOOD | {"hash_ids": [0]}, "hash_ids has 1 blocks, but an input_length of 600 tokens is 2 blocks of 512"),
        (GOOD | {"hash_ids": [0, 1, 2]}, "hash_ids has 3 blocks, but an input_length of 600 tokens is 2 blocks"),
        ('{"timestamp": 5, "input_le\n', "Invalid JSON"),
        ("[1, 2]\n", "record: Input should be an object"),
        ("\x00\x01\n", "Invalid JSON"),
        ("x" * (MAX_LINE_BYTES + 5), "longer than 1048576 bytes"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(write_trace: Callable[..., Path], row: object, complaint: str) -> None:
    path = write_trace([GOOD, "\n", row])
    rows = read_trace(path)
    assert next(rows).input_length == 600
    with pytest.raises(UserError) as refused:
        next(rows)
    message = str(refused.value)
    assert message.startswith(f"{path}, line 3: ")
    assert complaint in message
    assert "\n" not in message


def test_bad_rows_are_left_out_and_counted_by_option(write_trace: Callable[..., Path]) -> None:
    path = write_trace(['{"timestamp": 5, "input_le\n', GOOD, GOOD | {"timestamp": 4}, GOOD, '{"timestamp": 5, "inp'])
    counts = Counter[str]()
    assert len(list(read_trace(path, BadRows.SKIP, counts))) == 2
    assert counts == {"skipped_bad_rows": 3}


def test_a_line_without_end_is_never_left_out(write_trace: Callable[..., Path]) -> None:
    path = write_trace([GOOD, "x" * (MAX_LINE_BYTES + 5)])
    with pytest.raises(UserError, match="line 2: longer than 1048576 bytes"):
        list(read_trace(path, BadRows.SKIP))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_trace_without_rows_is_refused(write_trace: Callable[..., Path], content: str) -> None:
    path = write_trace([content])
    with pytest.raises(UserError, match="has no rows"):
        list(read_trace(path))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--trace: cannot read .*none\.jsonl: No such file"):
        list(read_trace(tmp_path / "none.jsonl"))


def test_fields_of_later_releases_are_let_pass(write_trace: Callable[..., Path]) -> None:
    assert len(list(read_trace(write_trace([GOOD | {"type": "text", "turn": 3}])))) == 1


SIXTEENS = {"timestamp": 61.114, "input_length": 521, "output_length": 132, "hash_ids": list(range(33)), "turn": 1}
ONE_BLOCK = {"timestamp": 61.0, "input_length": 9, "output_length": 3, "hash_ids": [77]}


@pytest.mark.parametrize("bad_rows", list(BadRows))
def test_blocks_of_another_size_are_told_of_and_never_left_out(
    write_trace: Callable[..., Path], bad_rows: BadRows
) -> None:
    path = write_trace([ONE_BLOCK, SIXTEENS])
    with pytest.raises(UserError) as refused:
        list(read_trace(path, bad_rows))
    assert str(refused.value) == (
        f"{path}: a prompt of 521 tokens has 33 blocks there, and 2 with 512 tokens each; give the block size of the "
        "trace by --trace-block-tokens, 16 for instance"
    )


def test_a_trace_with_small_blocks_and_seconds_is_read(write_trace: Callable[..., Path]) -> None:
    form = TraceForm(16, TimeUnit.S)
    one, other = read_trace(write_trace([ONE_BLOCK, SIXTEENS]), form=form)
    assert (one.at_ms, other.at_ms) == (61_000.0, pytest.approx(61_114.0))
    assert other.prompt_tokens(16, form) == 521
    assert other.prompt_tokens(4, form) == 32 * 4 + 2


def test_the_replay_takes_size_and_unit_by_option(write_trace: Callable[..., Path]) -> None:
    config = WorkloadConfig(
        workload="mooncake",
        replay=TraceConfig(trace=write_trace([ONE_BLOCK, SIXTEENS])),
        mooncake=MooncakeConfig(block_tokens=16, trace_block_tokens=16, trace_time_unit=TimeUnit.S),
    )
    timed = list(MooncakeWorkload(config))
    assert [len(one.prompt_token_ids or ()) for one in timed] == [9, 521]
    assert timed[1].at_ms == pytest.approx(114.0)

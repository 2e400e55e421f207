from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from core.errors import UserError
from workloads.burstgpt_trace import read_burstgpt_trace
from workloads.config import BadRows, FailedCalls

HEADER = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
GOOD = "5.25,7,1.5,ChatGPT,472,18,490,Conversation log\n"


def test_the_first_release_has_no_sessions(made_burstgpt_trace: Path) -> None:
    rows = list(read_burstgpt_trace(made_burstgpt_trace))
    assert [(row.at_ms, row.prompt_tokens, row.answer_tokens) for row in rows] == [
        (5000, 472, 18), (45000, 1, 230), (118000, 8000, 276),
    ]  # fmt: skip
    assert {row.session_id for row in rows} == {None}


def test_the_later_release_has_them_where_calls_are_of_a_conversation(made_burstgpt_sessions: Path) -> None:
    rows = list(read_burstgpt_trace(made_burstgpt_sessions))
    assert [row.session_id for row in rows] == ["7", "8", "7", None, None, "7", "7"]
    assert [row.at_ms for row in rows][2:4] == [7500, 8000]


@pytest.mark.parametrize(
    ("failed_calls", "lengths", "name"),
    [
        (FailedCalls.SKIP, [472, 1, 8000], "skipped_failed_calls"),
        (FailedCalls.KEEP, [472, 0, 1, 8000], "kept_failed_calls"),
    ],
)
def test_failed_calls_are_counted(
    made_burstgpt_trace: Path, failed_calls: FailedCalls, lengths: list[int], name: str
) -> None:
    counts = Counter[str]()
    rows = list(read_burstgpt_trace(made_burstgpt_trace, failed_calls, counts=counts))
    assert [row.prompt_tokens for row in rows] == lengths
    assert counts == {name: 1}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("6,7,1.5,ChatGPT,472\n", "Response tokens: missing; add it"),
        ("6,7,1.5,ChatGPT,-472,18,490,API log\n", "Request tokens: Input should be greater than or equal to 0"),
        ("6,7,1.5,ChatGPT,472,-18,490,API log\n", "Response tokens: Input should be greater than or equal to 0"),
        ("6,7,1.5,ChatGPT,some,18,490,API log\n", "Request tokens: Input should be a valid integer"),
        ("-6,7,1.5,ChatGPT,472,18,490,API log\n", "Timestamp: Input should be greater than or equal to 0"),
        ("inf,7,1.5,ChatGPT,472,18,490,API log\n", "Timestamp: Input should be a finite number"),
        ("soon,7,1.5,ChatGPT,472,18,490,API log\n", "Timestamp: Input should be a valid number"),
        ("5,7,1.5,ChatGPT,472,18,490,API log\n", "Timestamp: 5 is before the row above's 5.25; sort the trace"),
        (f"6,{'7' * 201},1.5,ChatGPT,472,18,490,API log\n", "Session ID: String should have at most 200 characters"),
        ('6,"7,1.5,ChatGPT,472,18,490,API log\n', "unexpected end of data; give a CSV trace"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line_or_left_out(
    write_csv: Callable[[str], Path], row: str, complaint: str
) -> None:
    path = write_csv(HEADER + GOOD + row + GOOD)
    rows = read_burstgpt_trace(path)
    assert next(rows).prompt_tokens == 472
    with pytest.raises(UserError) as refused:
        next(rows)
    message = str(refused.value)
    assert message.startswith(f"{path}, line 3: {complaint}")
    assert message.endswith("(--bad-rows skip leaves such rows out)")
    assert "\n" not in message
    counts = Counter[str]()
    assert len(list(read_burstgpt_trace(path, bad_rows=BadRows.SKIP, counts=counts))) == 2
    assert counts == {"skipped_bad_rows": 1}


@pytest.mark.parametrize("bad_rows", BadRows)
def test_a_missing_column_is_named(write_csv: Callable[[str], Path], bad_rows: BadRows) -> None:
    path = write_csv("Timestamp,Model,Request tokens,Total tokens,Log Type\n5,ChatGPT,472,490,API log\n")
    with pytest.raises(UserError, match=r"trace\.csv, line 1: no column Response tokens; give a CSV trace with the"):
        list(read_burstgpt_trace(path, bad_rows=bad_rows))


@pytest.mark.parametrize("bad_rows", BadRows)
@pytest.mark.parametrize("content", ["", "\n", HEADER])
def test_a_trace_without_rows_is_refused(write_csv: Callable[[str], Path], content: str, bad_rows: BadRows) -> None:
    with pytest.raises(UserError, match=r"trace\.csv: has no rows; give a CSV trace with the columns Timestamp, "):
        list(read_burstgpt_trace(write_csv(content), bad_rows=bad_rows))


def test_a_trace_of_bad_rows_alone_is_refused(write_csv: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"trace\.csv: all of its 2 rows are bad; give a CSV trace"):
        list(read_burstgpt_trace(write_csv(HEADER + "a\nb\n"), bad_rows=BadRows.SKIP))

import bz2
import gzip
import lzma
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest

from core.errors import UserError
from workloads.azure_trace import read_azure_trace
from workloads.config import BadRows
from workloads.trace_rows import MAX_LINE_BYTES

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
GOOD = "2023-11-16 18:15:46.6805900,374,44\n"


def test_every_row_is_read_in_order(any_azure_trace: Path) -> None:
    rows = list(read_azure_trace(any_azure_trace))
    assert len(rows) == sum(1 for line in any_azure_trace.open() if line.strip()) - 1
    assert all(before.timestamp <= after.timestamp for before, after in pairwise(rows))


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("2023-11-16 18:15:47,374\n", "GeneratedTokens: missing"),
        ("2023-11-16 18:15:47,-1,44\n", "ContextTokens: Input should be greater than or equal to 1"),
        ("2023-11-16 18:15:47,0,44\n", "ContextTokens: Input should be greater than or equal to 1"),
        ("2023-11-16 18:15:47,374,-1\n", "GeneratedTokens: Input should be greater than or equal to 0"),
        ("2023-11-16 18:15:47,many,44\n", "ContextTokens: Input should be a valid integer"),
        ("2023-11-16 18:15:47,,44\n", "ContextTokens: Input should be a valid integer"),
        ("2023-11-16 18:15:47,374,4.5\n", "GeneratedTokens: Input should be a valid integer"),
        ("2023-11-16 18:15:47,374,nan\n", "GeneratedTokens: Input should be a valid integer"),
        ("yesterday,374,44\n", "TIMESTAMP: Input should be a valid datetime"),
        ("2023-11-16 18:15:46,374,44\n", "TIMESTAMP: 2023-11-16 18:15:46+00:00 is before the row above's"),
        ('2023-11-16 18:15:47,"374,44\n', "give a CSV trace"),
        ("\udcff\udcfe\x00,374,44\n", "TIMESTAMP: "),
        ("x" * (MAX_LINE_BYTES + 5), "longer than 1048576 bytes"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(write_csv: Callable[[str], Path], row: str, complaint: str) -> None:
    path = write_csv(HEADER + GOOD + ",,\n" + row)
    rows = read_azure_trace(path)
    assert next(rows).prompt_tokens == 374
    with pytest.raises(UserError) as refused:
        next(rows)
    message = str(refused.value)
    assert message.startswith(f"{path}, line 4: ")
    assert complaint in message
    assert "\n" not in message


def test_bad_rows_are_left_out_and_counted_by_option(write_csv: Callable[[str], Path]) -> None:
    path = write_csv(HEADER + "x,374,44\n" + GOOD + '2023-11-16 18:15:47,"374,44\n' + GOOD)
    counts = Counter[str]()
    assert len(list(read_azure_trace(path, BadRows.SKIP, counts))) == 2
    assert counts == {"skipped_bad_rows": 2}


def test_a_missing_column_is_named(write_csv: Callable[[str], Path]) -> None:
    path = write_csv("TIMESTAMP,ContextTokens,Generated\n" + GOOD)
    with pytest.raises(UserError, match=r"trace\.csv, line 1: no column GeneratedTokens; give a CSV trace with"):
        list(read_azure_trace(path))


@pytest.mark.parametrize("content", ["", "\n", HEADER])
def test_a_trace_without_rows_is_refused(write_csv: Callable[[str], Path], content: str) -> None:
    with pytest.raises(UserError, match=r"trace\.csv: has no rows"):
        list(read_azure_trace(write_csv(content)))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--trace: cannot read .*none\.csv: No such file"):
        list(read_azure_trace(tmp_path / "none.csv"))


def test_columns_may_stand_in_any_order_among_others(write_csv: Callable[[str], Path]) -> None:
    path = write_csv(
        "\ufeffGeneratedTokens, Model ,TIMESTAMP,ContextTokens\r\n44,m,2024-05-10 00:00:00.5+00:00,374\r\n"
    )
    (row,) = read_azure_trace(path)
    assert (row.prompt_tokens, row.answer_tokens) == (374, 44)
    assert row.timestamp == datetime(2024, 5, 10, 0, 0, 0, 500_000, UTC)


@pytest.mark.parametrize("time", ["20231116", "1500", "0", "1.7e9", "1700158546.68"])
def test_a_number_is_no_date_and_time(write_csv: Callable[[str], Path], time: str) -> None:
    with pytest.raises(UserError, match=rf"TIMESTAMP: '{time}' is a number; give date and time"):
        list(read_azure_trace(write_csv(f"{HEADER}{time},374,44\n")))


def test_whole_numbers_may_be_written_as_floats(write_csv: Callable[[str], Path]) -> None:
    path = write_csv(f"{HEADER}2023-11-16 18:15:46,1.2e3,4.4E+01\n2023-11-16 18:15:47,374.0,44.0\n")
    assert [(row.prompt_tokens, row.answer_tokens) for row in read_azure_trace(path)] == [(1200, 44), (374, 44)]
    for bad in ("1.25e1", "1e", "e5", "1e400"):
        with pytest.raises(UserError, match="ContextTokens: Input should be"):
            list(read_azure_trace(write_csv(f"{HEADER}2023-11-16 18:15:46,{bad},44\n")))


PUBLISHED = """TIMESTAMP,NumImages,ContextTokens,GeneratedTokens
2024-09-01 00:00:00.100000+00:00,3,1800,120
2024-09-01 00:00:00.200000+00:00,0,30,9
"""


def test_a_trace_may_be_packed_as_it_is_published(tmp_path: Path) -> None:
    """Azure publishes its trace of 2025 as `.csv.gz`."""
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(PUBLISHED.encode()))
    rows = list(read_azure_trace(path))
    assert [(row.prompt_tokens, row.answer_tokens) for row in rows] == [(1800, 120), (30, 9)]
    assert rows[1].at_ms - rows[0].at_ms == pytest.approx(100.0)
    path.write_bytes(gzip.compress(PUBLISHED.encode() * 500)[:60])
    with pytest.raises(UserError, match="is damaged"):
        list(read_azure_trace(path))


@pytest.mark.parametrize(
    ("packed", "name"),
    [(bz2.compress(b"x" * 99), "bzip2"), (lzma.compress(b"x"), "xz"), (b"PK\x03\x04xxxxxxxx", "zip")],
)
def test_other_compressed_files_are_named(tmp_path: Path, packed: bytes, name: str) -> None:
    path = tmp_path / "trace"
    path.write_bytes(packed)
    with pytest.raises(UserError, match=f"is a {name} file; unpack it"):
        list(read_azure_trace(path))

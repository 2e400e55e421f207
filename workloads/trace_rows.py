"""Reading a trace of any format: lines of bounded length, rows in the order of their time, and what bad ones become."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from core.errors import UserError, one_line
from workloads.adjustments import SKIPPED_BAD_ROWS
from workloads.config import BadRows

MAX_LINE_BYTES = 1 << 20
"""Longest line that is read; above it the file is something else (the longest of the known releases is below 4 KiB)."""


class TimedRow(BaseModel):
    """A row of a trace: a request, and when it came."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    timestamp: Any
    """As the format has it, under the format's alias and of its type."""

    @property
    def at_ms(self) -> float:
        """When the request came, in ms since a moment that is the format's own."""
        raise NotImplementedError

    def time_as_given(self) -> str:
        """The time for a person: the trace's name of it, and its value."""
        name = type(self).model_fields["timestamp"].alias or "timestamp"
        value = f"{self.timestamp:.15g}" if isinstance(self.timestamp, float) else self.timestamp
        return f"{name}: {value}"


Row = TypeVar("Row", bound=TimedRow)


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of each line that is not blank, one in memory at a time.

    Raises `UserError` for a file that is missing or unreadable, and for a line above `MAX_LINE_BYTES`.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
                if len(line) > MAX_LINE_BYTES:
                    raise UserError(
                        f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes; give a trace, a request a line"
                    )
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(f"--trace: cannot read {path}: {error.strerror}; give the path of a trace") from None


def read_rows(
    path: Path,
    lines: Iterator[tuple[int, bytes]],
    parse: Callable[[bytes], Row],
    *,
    form: str,
    bad_rows: BadRows,
    counts: Counter[str] | None,
) -> Iterator[Row]:
    """The rows that `parse` makes of `lines`, in order, one in memory at a time.

    Bad is a row that `parse` refuses with a `ValueError`, and one whose time is before that of the good row above.
    One row whose time is far too late therefore makes all after it bad.
    Bad rows are left out and counted in `counts` under `SKIPPED_BAD_ROWS`, or raise `UserError` with file and line.
    Raises `UserError` for a trace without a good row; `form` says what it should be.
    """
    previous: Row | None = None
    skipped = 0
    for number, line in lines:
        try:
            row = parse(line)
            if previous is not None and row.at_ms < previous.at_ms:
                _, _, before = previous.time_as_given().partition(": ")
                raise ValueError(f"{row.time_as_given()} is before the row above's {before}; sort the trace")
        except ValueError as error:
            if bad_rows is BadRows.SKIP:
                skipped += 1
                if counts is not None:
                    counts[SKIPPED_BAD_ROWS] += 1
                continue
            complaint = one_line(error) if isinstance(error, ValidationError) else str(error)
            raise UserError(f"{path}, line {number}: {complaint} (--bad-rows skip leaves such rows out)") from None
        previous = row
        yield row
    if previous is None:
        found = f"all of its {skipped} rows are bad" if skipped else "has no rows"
        raise UserError(f"{path}: {found}; give a {form}")

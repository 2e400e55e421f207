"""Reading a trace of any format: lines of bounded length, rows in the order of their times, handling of bad rows."""

import gzip
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from core.errors import UserError, one_line
from workloads.adjustments import SKIPPED_BAD_ROWS
from workloads.config import BadRows

MAX_LINE_BYTES = 1 << 20
"""Maximum length of a line. Lines of the known releases are below 4 KiB, so a longer one means another kind of file."""


_GZIP = b"\x1f\x8b"
_COMPRESSED = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd", b"PAR1": "parquet"}
"""First bytes of compressed formats that are not supported."""


def _without_exponent(value: Any) -> Any:
    """Accept whole numbers such as `1.2e3`, as tools that hold numbers as floats write them."""
    if isinstance(value, str) and "e" in value.lower():
        try:
            number = float(value)
        except ValueError:
            return value
        return str(int(number)) if number.is_integer() else value
    return value


Count = Annotated[int, BeforeValidator(_without_exponent)]
"""A whole number in a CSV file."""


class TimedRow(BaseModel):
    """A row of a trace: a request and its arrival."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    timestamp: Any
    """The arrival, with the alias and type of the format."""

    @property
    def at_ms(self) -> float:
        """Arrival of the request in ms, counted from an origin that depends on the format."""
        raise NotImplementedError

    def time_as_given(self) -> str:
        """The arrival for an error message: the trace's own name of the column, and its value."""
        name = type(self).model_fields["timestamp"].alias or "timestamp"
        value = f"{self.timestamp:.15g}" if isinstance(self.timestamp, float) else self.timestamp
        return f"{name}: {value}"


Row = TypeVar("Row", bound=TimedRow)


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number (from 1) and bytes of each line that is not blank, one in memory at a time. Gzip is unpacked.

    Raises `UserError` if the file is missing, unreadable or compressed in another way, or a line is longer than
    `MAX_LINE_BYTES`.
    """
    try:
        with _opened(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
                if len(line) > MAX_LINE_BYTES:
                    raise UserError(
                        f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes; give a trace, one request per line"
                    )
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"--trace: {path} is damaged ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"--trace: cannot read {path}: {error.strerror}; give the path of a trace") from None


def _opened(path: Path) -> gzip.GzipFile | BufferedReader:
    with path.open("rb") as file:
        begins = file.read(8)
    for magic, name in _COMPRESSED.items():
        if begins.startswith(magic):
            raise UserError(f"--trace: {path} is a {name} file; unpack it, or give it as gzip")
    return gzip.open(path, "rb") if begins.startswith(_GZIP) else path.open("rb")


def read_rows(
    path: Path,
    lines: Iterator[tuple[int, bytes]],
    parse: Callable[[bytes], Row],
    *,
    form: str,
    bad_rows: BadRows,
    counts: Counter[str] | None,
) -> Iterator[Row]:
    """Yield the rows that `parse` makes of `lines`, in order, one in memory at a time.

    A row is bad if `parse` raises `ValueError`, or if its time is before that of the last good row. So one row with a
    time far too late makes all rows after it bad. With `BadRows.SKIP` bad rows are left out, and counted in `counts` as
    `SKIPPED_BAD_ROWS`; otherwise they raise `UserError` with file and line. A trace without a good row raises
    `UserError`; `form` describes the expected form.
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

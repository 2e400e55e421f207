"""Reading a trace that is a CSV file with a header: what the formats of Azure and BurstGPT have in common."""

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from core.errors import UserError
from workloads.config import BadRows
from workloads.trace_rows import Row, numbered_lines, read_rows


def read_csv_trace(
    path: Path, row_type: type[Row], bad_rows: BadRows = BadRows.ERROR, counts: Counter[str] | None = None
) -> Iterator[Row]:
    """The rows in order, one in memory at a time; a column is the field of `row_type` whose alias it is.

    Columns may stand in any order and among others. Rows are lines: quoted values do not hold line ends.
    Bad rows, `counts` and errors are those of `read_rows`; a column that is missing is always an error.
    """
    columns = [str(field.alias) for field in row_type.model_fields.values() if field.is_required()]
    form = f"CSV trace with the columns {', '.join(columns)}"
    # Spreadsheets end a file with lines of separators alone: these are blank too.
    lines = ((number, line) for number, line in numbered_lines(path) if line.strip(b",\r\n\t "))
    header = _header(path, lines, columns, form)

    def parse(line: bytes) -> Row:
        # Values that a row lacks are missing fields; values beyond the header have no name and are let pass.
        return row_type.model_validate(dict(zip(header, _values(line), strict=False)))

    yield from read_rows(path, lines, parse, form=form, bad_rows=bad_rows, counts=counts)


def _header(path: Path, lines: Iterator[tuple[int, bytes]], columns: list[str], form: str) -> list[str]:
    for number, line in lines:
        try:
            header = [name.strip() for name in _values(line)]
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        missing = [name for name in columns if name not in header]
        if missing:
            raise UserError(f"{path}, line {number}: no column {', '.join(missing)}; give a {form}")
        return header
    raise UserError(f"{path}: has no rows; give a {form}")


def _values(line: bytes) -> list[str]:
    """Raises `ValueError` where the line is not one of a CSV file."""
    try:
        # What is not UTF-8 becomes a character that no number or date holds, so that its row is named.
        return next(csv.reader([line.decode("utf-8-sig", errors="replace")], strict=True))
    except csv.Error as error:
        raise ValueError(f"{error}; give a CSV trace") from None

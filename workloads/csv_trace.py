"""Reading a trace that is a CSV file with a header, as those of Azure and BurstGPT are."""

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
    """Yield the rows in order, one in memory at a time. A column's name is the alias of a field of `row_type`.

    Columns may be in any order, with others among them. A row is one line: quoted values contain no line ends. Bad
    rows, `counts` and errors: see `read_rows`. A missing column is always an error.
    """
    columns = [str(field.alias) for field in row_type.model_fields.values() if field.is_required()]
    form = f"CSV trace with the columns {', '.join(columns)}"
    # Spreadsheets end a file with lines of separators only; these count as blank.
    lines = ((number, line) for number, line in numbered_lines(path) if line.strip(b",\r\n\t "))
    header = _header(path, lines, columns, form)

    def parse(line: bytes) -> Row:
        # A row that is too short lacks fields; values beyond the header have no name and are ignored.
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
    """Raises `ValueError` if the line is not valid CSV."""
    try:
        # Bytes that are not UTF-8 become a character that no number or date contains, so the error names the row.
        return next(csv.reader([line.decode("utf-8-sig", errors="replace")], strict=True))
    except csv.Error as error:
        raise ValueError(f"{error}; give a CSV trace") from None

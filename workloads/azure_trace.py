"""Reading an Azure LLM inference trace (Azure/AzurePublicDataset, CC-BY), row by row.

CSV with the columns `TIMESTAMP` (date and time, UTC where it names no zone), `ContextTokens` and `GeneratedTokens`.
The trace holds neither text nor users; columns beyond these three are let pass.
"""

import csv
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from core.errors import UserError, one_line

MAX_LINE_CHARACTERS = 1 << 16
"""Longest line that is read; above it the file is something else (the release's have about 40)."""


class AzureRow(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    timestamp: datetime = Field(alias="TIMESTAMP")
    context_tokens: int = Field(alias="ContextTokens", ge=1)
    generated_tokens: int = Field(alias="GeneratedTokens", ge=0)

    @field_validator("timestamp")
    @classmethod
    def _in_utc(cls, value: datetime) -> datetime:
        return value if value.tzinfo else value.replace(tzinfo=UTC)


COLUMNS = tuple(str(field.alias) for field in AzureRow.model_fields.values())


def read_azure_trace(path: Path) -> Iterator[AzureRow]:
    """The rows in order, one in memory at a time.

    Raises `UserError` with file and line for a missing column, for a row that is not one, for a timestamp before the
    row's above, and for a file that is missing, unreadable or without rows.
    """
    row: AzureRow | None = None
    try:
        # What is not UTF-8 becomes a character that no number or date holds, so that its row is named.
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as text:
            for number, values in _rows(path, text):
                previous = row.timestamp if row else None
                try:
                    row = AzureRow.model_validate(values)
                except ValidationError as error:
                    raise UserError(f"{path}, line {number}: {one_line(error)}") from None
                if previous is not None and row.timestamp < previous:
                    raise UserError(
                        f"{path}, line {number}: TIMESTAMP: {row.timestamp} is before the row above's {previous}; "
                        "sort the trace"
                    )
                yield row
    except OSError as error:
        raise UserError(f"--trace: cannot read {path}: {error.strerror}; give the path of a trace") from None
    if row is None:
        raise UserError(f"{path}: has no rows; give a CSV trace with the columns {', '.join(COLUMNS)}")


def _rows(path: Path, text: TextIO) -> Iterator[tuple[int, dict[str, str]]]:
    """Each row's line number and values by column; a column that the row lacks is left out."""
    reader = csv.reader(_lines(path, text), strict=True)
    header: list[str] | None = None
    try:
        for values in reader:
            if not any(values):
                continue
            if header is None:
                header = [name.strip() for name in values]
                missing = [name for name in COLUMNS if name not in header]
                if missing:
                    raise UserError(
                        f"{path}, line {reader.line_num}: no column {', '.join(missing)}; "
                        f"give a CSV trace with the columns {', '.join(COLUMNS)}"
                    )
                continue
            yield reader.line_num, dict(zip(header, values, strict=False))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; give a CSV trace") from None


def _lines(path: Path, text: TextIO) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: text.readline(MAX_LINE_CHARACTERS + 1), ""), start=1):
        if len(line) > MAX_LINE_CHARACTERS:
            raise UserError(f"{path}, line {number}: longer than {MAX_LINE_CHARACTERS} characters; give a CSV trace")
        yield line

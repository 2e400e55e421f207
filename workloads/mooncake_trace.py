"""Reading a trace in the format of Mooncake's FAST'25 release (kvcache-ai/Mooncake, Apache-2.0), row by row.

A row is one JSON object: `timestamp` (ms since the trace began), `input_length` and `output_length` (tokens), and
`hash_ids`, one id per 512-token block of the prompt, the last of which may be partial. A block's id stands for the
block and all that is before it, so that two prompts with equal leading ids have an equal prefix. Fields beyond these
four are let pass: later releases add some.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from core.errors import UserError, one_line

TRACE_BLOCK_TOKENS = 512
MAX_LINE_BYTES = 1 << 20
"""Longest line that is read; above it the file is something else (the longest of the release is below 4 KiB)."""


class TraceRow(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    timestamp: float = Field(ge=0)
    input_length: int = Field(ge=1)
    output_length: int = Field(ge=0)
    hash_ids: tuple[Annotated[int, Field(ge=0)], ...]

    @model_validator(mode="after")
    def _blocks_hold_the_input(self) -> Self:
        needed = -(-self.input_length // TRACE_BLOCK_TOKENS)
        if len(self.hash_ids) != needed:
            raise ValueError(
                f"hash_ids has {len(self.hash_ids)} blocks, but an input_length of {self.input_length} tokens "
                f"is {needed} blocks of {TRACE_BLOCK_TOKENS}; mend either"
            )
        return self


def read_trace(path: Path) -> Iterator[TraceRow]:
    """The rows in order, one in memory at a time.

    Raises `UserError` with file and line for a row that is not one, for a timestamp before the row's above, and for a
    file that is missing, unreadable or without rows.
    """
    row: TraceRow | None = None
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES + 1), b""), start=1):
                if not line.strip():
                    continue
                previous_ms = row.timestamp if row else 0.0
                row = _parse(path, number, line)
                if row.timestamp < previous_ms:
                    raise UserError(
                        f"{path}, line {number}: timestamp: {row.timestamp:g} is before the row above's "
                        f"{previous_ms:g}; sort the trace"
                    )
                yield row
    except OSError as error:
        raise UserError(f"--trace: cannot read {path}: {error.strerror}; give the path of a trace") from None
    if row is None:
        raise UserError(f"{path}: has no rows; give a trace of JSON lines")


def _parse(path: Path, number: int, line: bytes) -> TraceRow:
    if len(line) > MAX_LINE_BYTES:
        raise UserError(f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes; give a trace of JSON lines")
    try:
        return TraceRow.model_validate_json(line)
    except ValidationError as error:
        raise UserError(f"{path}, line {number}: {one_line(error)}") from None

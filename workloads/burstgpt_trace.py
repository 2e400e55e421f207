"""Reading a BurstGPT trace (HPMLL/BurstGPT, CC-BY), row by row.

CSV with the columns `Timestamp` (s since the trace's first midnight), `Request tokens` and `Response tokens`. A failed
call has 0 response tokens, and often 0 request tokens too. The later release also has `Session ID`, which is empty for
calls outside of conversations. The trace has no text and no users. Other columns (`Model`, `Log Type`, `Total tokens`,
`Elapsed time`) are ignored.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, field_validator

from workloads.adjustments import KEPT_FAILED_CALLS, SKIPPED_FAILED_CALLS
from workloads.config import BadRows, FailedCalls
from workloads.csv_trace import read_csv_trace
from workloads.trace_rows import Count, TimedRow

MAX_SESSION_CHARACTERS = 200


class BurstGPTRow(TimedRow):
    timestamp: float = Field(alias="Timestamp", ge=0)
    prompt_tokens: Count = Field(alias="Request tokens", ge=0)
    answer_tokens: Count = Field(alias="Response tokens", ge=0)
    session_id: str | None = Field(default=None, alias="Session ID", max_length=MAX_SESSION_CHARACTERS)

    @field_validator("session_id")
    @classmethod
    def _none_where_empty(cls, value: str | None) -> str | None:
        return (value or "").strip() or None

    @property
    def at_ms(self) -> float:
        return self.timestamp * 1000

    @property
    def failed(self) -> bool:
        return self.answer_tokens == 0


def read_burstgpt_trace(
    path: Path,
    failed_calls: FailedCalls = FailedCalls.SKIP,
    bad_rows: BadRows = BadRows.ERROR,
    counts: Counter[str] | None = None,
) -> Iterator[BurstGPTRow]:
    """Yield the rows in order, one in memory at a time. Bad rows and errors: see `read_csv_trace`.

    `counts` gets the number of failed calls, as `SKIPPED_FAILED_CALLS` or `KEPT_FAILED_CALLS`.
    """
    for row in read_csv_trace(path, BurstGPTRow, bad_rows, counts):
        if row.failed:
            skip = failed_calls is FailedCalls.SKIP
            if counts is not None:
                counts[SKIPPED_FAILED_CALLS if skip else KEPT_FAILED_CALLS] += 1
            if skip:
                continue
        yield row

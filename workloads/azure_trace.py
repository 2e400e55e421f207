"""Reading an Azure LLM inference trace (Azure/AzurePublicDataset, CC-BY), row by row.

CSV with the columns `TIMESTAMP` (date and time, UTC where it names no zone), `ContextTokens` and `GeneratedTokens`.
The trace has no text and no users. Other columns are ignored.
"""

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from workloads.config import BadRows
from workloads.csv_trace import read_csv_trace
from workloads.trace_rows import Count, TimedRow

EPOCH = datetime(2023, 1, 1, tzinfo=UTC)
"""Close to the traces' dates, so that a float of milliseconds still resolves microseconds."""


class AzureRow(TimedRow):
    timestamp: datetime = Field(alias="TIMESTAMP")
    prompt_tokens: Count = Field(alias="ContextTokens", ge=1)
    answer_tokens: Count = Field(alias="GeneratedTokens", ge=0)

    @field_validator("timestamp", mode="before")
    @classmethod
    def _no_number(cls, value: Any) -> Any:
        """Reject numbers: one could be seconds, milliseconds, or a date without separators."""
        try:
            float(value)
        except (TypeError, ValueError):
            return value
        raise ValueError(f"{value!r} is a number; give date and time, such as 2023-11-16 18:15:46.680590")

    @field_validator("timestamp")
    @classmethod
    def _in_utc(cls, value: datetime) -> datetime:
        return value if value.tzinfo else value.replace(tzinfo=UTC)

    @property
    def at_ms(self) -> float:
        return (self.timestamp - EPOCH) / timedelta(milliseconds=1)

    @property
    def session_id(self) -> str | None:
        """None: the trace has no sessions."""
        return None


def read_azure_trace(
    path: Path, bad_rows: BadRows = BadRows.ERROR, counts: Counter[str] | None = None
) -> Iterator[AzureRow]:
    """Yield the rows in order, one in memory at a time. Bad rows, `counts` and errors: see `read_csv_trace`."""
    return read_csv_trace(path, AzureRow, bad_rows, counts)

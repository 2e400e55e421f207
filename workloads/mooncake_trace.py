"""Reading a trace in the format of Mooncake's FAST'25 release (kvcache-ai/Mooncake, Apache-2.0), row by row.

A row is one JSON object: `timestamp` (ms since the trace began), `input_length` and `output_length` (tokens), and
`hash_ids`, one id per 512-token block of the prompt, the last of which may be partial. A block's id stands for the
block and all that is before it, so that two prompts with equal leading ids have an equal prefix. Fields beyond these
four are let pass: later releases add some.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from workloads.config import BadRows
from workloads.trace_rows import TimedRow, numbered_lines, read_rows

TRACE_BLOCK_TOKENS = 512


class TraceRow(TimedRow):
    model_config = ConfigDict(strict=True)

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

    @property
    def at_ms(self) -> float:
        return self.timestamp

    def prompt_tokens(self, block_tokens: int) -> int:
        """Length of the prompt where a block becomes `block_tokens` tokens.

        The last block is scaled in proportion to what it holds in the trace, and never to nothing.
        """
        before_last = len(self.hash_ids) - 1
        held = self.input_length - before_last * TRACE_BLOCK_TOKENS
        return before_last * block_tokens + max(1, held * block_tokens // TRACE_BLOCK_TOKENS)


def read_trace(path: Path, bad_rows: BadRows = BadRows.ERROR, counts: Counter[str] | None = None) -> Iterator[TraceRow]:
    """The rows in order, one in memory at a time; what is bad, counted and raised is said at `read_rows`."""
    return read_rows(
        path,
        numbered_lines(path),
        TraceRow.model_validate_json,
        form="trace of JSON lines",
        bad_rows=bad_rows,
        counts=counts,
    )

"""Reading a trace in the format of Mooncake's FAST'25 release (kvcache-ai/Mooncake, Apache-2.0), row by row.

A row is one JSON object: `timestamp` (ms since the trace began), `input_length` and `output_length` (tokens), and
`hash_ids`, one id per 512-token block of the prompt. The last block may be partial. A block's id stands for the block
and all blocks before it, so prompts with equal leading ids have an equal prefix. Other fields are ignored: later
releases add some. Some traces of this format have another block size or seconds (Qwen-Bailian: 16 tokens, seconds);
`TraceForm` describes this.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field

from core.errors import UserError
from workloads.config import BadRows, TimeUnit
from workloads.trace_rows import TimedRow, numbered_lines, read_rows

TRACE_BLOCK_TOKENS = 512


@dataclass(frozen=True)
class TraceForm:
    """Block size and time unit of a trace, which its rows do not say. The default is Mooncake's."""

    block_tokens: int = TRACE_BLOCK_TOKENS
    time_unit: TimeUnit = TimeUnit.MS

    def blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)


MOONCAKE = TraceForm()


class TraceRow(TimedRow):
    model_config = ConfigDict(strict=True)

    timestamp: float = Field(ge=0)
    input_length: int = Field(ge=1)
    output_length: int = Field(ge=0)
    hash_ids: tuple[Annotated[int, Field(ge=0)], ...]

    @property
    def at_ms(self) -> float:
        return self.timestamp

    def prompt_tokens(self, block_tokens: int, form: TraceForm = MOONCAKE) -> int:
        """Length of the prompt if a whole block becomes `block_tokens` tokens.

        The last block is scaled in proportion to its tokens in the trace, to at least one token.
        """
        before_last = len(self.hash_ids) - 1
        held = self.input_length - before_last * form.block_tokens
        return before_last * block_tokens + max(1, held * block_tokens // form.block_tokens)


def read_trace(
    path: Path,
    bad_rows: BadRows = BadRows.ERROR,
    counts: Counter[str] | None = None,
    form: TraceForm = MOONCAKE,
) -> Iterator[TraceRow]:
    """Yield the rows in order, one in memory at a time, with times in ms. Bad rows, `counts`, errors: see `read_rows`.

    The first row with several blocks shows their size. If that is not the size of `form`, `UserError` is raised even
    with `BadRows.SKIP`: otherwise rows of a single block would be read with the wrong size.
    """
    return read_rows(
        path, numbered_lines(path), _parser(path, form), form="trace of JSON lines", bad_rows=bad_rows, counts=counts
    )


def _parser(path: Path, form: TraceForm) -> Callable[[bytes], TraceRow]:
    size_is_known = False

    def parse(line: bytes) -> TraceRow:
        nonlocal size_is_known
        row = TraceRow.model_validate_json(line)
        given, needed = len(row.hash_ids), form.blocks_of(row.input_length)
        if given == needed:
            size_is_known = size_is_known or given > 1
            return row if form.time_unit is TimeUnit.MS else row.model_copy(update={"timestamp": 1000 * row.timestamp})
        if given > 1 and not size_is_known:
            raise UserError(
                f"{path}: a prompt of {row.input_length} tokens has {given} blocks there, and {needed} with "
                f"{form.block_tokens} tokens each; give the block size of the trace by --trace-block-tokens, "
                f"{_block_size(row.input_length, given)} for instance"
            )
        raise ValueError(
            f"hash_ids has {given} blocks, but an input_length of {row.input_length} tokens "
            f"is {needed} blocks of {form.block_tokens}; mend either"
        )

    return parse


def _block_size(tokens: int, blocks: int) -> int:
    """Return a block size that cuts `tokens` tokens into `blocks` blocks; a power of two if possible."""
    least = -(-tokens // blocks)
    power = 1 << (least - 1).bit_length()
    return power if -(-tokens // power) == blocks else least

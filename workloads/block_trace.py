"""A trace of any format as accesses to blocks of tokens, without the tokens: all that a study of caches needs.

Arrivals, lengths and the blocks of a Mooncake trace come from the trace. The blocks of the other two formats are
generated, because these traces have no text. Each BurstGPT session has one stream of tokens, and its prompts are
beginnings of that stream (`workloads.burstgpt`), so they share blocks. All other requests share nothing.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from math import isfinite
from pathlib import Path

from core.errors import UserError
from workloads.azure_trace import AzureRow, read_azure_trace
from workloads.burstgpt_trace import BurstGPTRow, read_burstgpt_trace
from workloads.config import BadRows, FailedCalls
from workloads.mooncake_trace import MOONCAKE, TRACE_BLOCK_TOKENS, TraceForm, TraceRow, read_trace
from workloads.token_ids import made_token_ids

SESSION_BLOCKS = 1 << 62
"""Ids of generated session blocks are from here to twice this; ids of blocks that are not shared count up from 0."""


class TraceFormat(StrEnum):
    MOONCAKE = "mooncake"
    BURSTGPT = "burstgpt"
    AZURE = "azure"


@dataclass(frozen=True, slots=True)
class BlockRequest:
    """A request that comes `at_ms` milliseconds after the trace's first, and the blocks of its prompt.

    `blocks` are the ids of blocks of `block_tokens` tokens; the last block holds the rest of `tokens`. Equal ids mean
    equal blocks with equal prefixes before them. A partial block and the whole block have different ids.
    """

    at_ms: float
    blocks: tuple[int, ...]
    tokens: int
    block_tokens: int


def read_blocks(
    path: Path,
    trace_format: TraceFormat,
    *,
    time_scale: float = 1.0,
    length_scale: float = 1.0,
    block_tokens: int = TRACE_BLOCK_TOKENS,
    form: TraceForm = MOONCAKE,
    failed_calls: FailedCalls = FailedCalls.SKIP,
    bad_rows: BadRows = BadRows.ERROR,
    counts: Counter[str] | None = None,
) -> Iterator[BlockRequest]:
    """Yield the requests in order, one in memory at a time.

    Times are divided by `time_scale`. Lengths are multiplied by `length_scale`, and are at least 1. A Mooncake trace
    keeps its own blocks, which `form` describes; only their number of tokens is scaled. `block_tokens` is the size of
    blocks of the other formats. `failed_calls` applies to BurstGPT only. Ids are below 2**63, except those of a
    Mooncake trace, and are the same in every process. The format's reader adds to `counts` and raises its errors
    while rows are read.
    """
    for name, value in (("time_scale", time_scale), ("length_scale", length_scale), ("block_tokens", block_tokens)):
        if not (value > 0 and isfinite(value)):
            raise UserError(f"{name}: {value} is not a number above 0; give one")
    rows: Iterator[TraceRow] | Iterator[BurstGPTRow] | Iterator[AzureRow]
    match trace_format:
        case TraceFormat.MOONCAKE:
            rows = read_trace(path, bad_rows, counts, form)
        case TraceFormat.BURSTGPT:
            rows = read_burstgpt_trace(path, failed_calls, bad_rows, counts)
        case TraceFormat.AZURE:
            rows = read_azure_trace(path, bad_rows, counts)
    return _requests(rows, time_scale, length_scale, block_tokens, form)


def _requests(
    rows: Iterator[TraceRow] | Iterator[BurstGPTRow] | Iterator[AzureRow],
    time_scale: float,
    length_scale: float,
    block_tokens: int,
    form: TraceForm,
) -> Iterator[BlockRequest]:
    fresh = count()
    began_ms: float | None = None
    for row in rows:
        began_ms = row.at_ms if began_ms is None else began_ms
        at_ms = (row.at_ms - began_ms) / time_scale
        if isinstance(row, TraceRow):
            scaled = max(1, round(form.block_tokens * length_scale))
            yield BlockRequest(at_ms, row.hash_ids, row.prompt_tokens(scaled, form), scaled)
            continue
        tokens = max(1, round(row.prompt_tokens * length_scale))
        if row.session_id is None:
            blocks = tuple(next(fresh) for _ in range(-(-tokens // block_tokens)))
        else:
            blocks = _session_blocks(row.session_id, tokens, block_tokens)
        yield BlockRequest(at_ms, blocks, tokens, block_tokens)


def _session_blocks(session: str, tokens: int, block_tokens: int) -> tuple[int, ...]:
    """Derive the ids from the session and the place in its stream, so that no session has to be remembered.

    An id is 62 bits of a hash: among 10**8 distinct blocks, two collide with a probability of about 0.1 %.
    """
    whole, rest = divmod(tokens, block_tokens)
    words = made_token_ids(block_tokens, f"whole/{session}", whole, SESSION_BLOCKS)
    if rest:
        words += made_token_ids(block_tokens, f"first {tokens}/{session}", 1, SESSION_BLOCKS)
    return tuple(SESSION_BLOCKS + word for word in words)

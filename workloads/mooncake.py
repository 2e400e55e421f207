"""Replay of a Mooncake trace: its arrivals, its scaled lengths, and prompts that share the prefixes of the trace.

The trace names blocks and has no text. A block's id determines its tokens, so equal ids give equal tokens, and the
replay has the prefixes of the trace. A partial last block has its own id in the trace. So the turn that later completes
it shares only the whole blocks before it.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from core.errors import UserError
from workloads.adjustments import CUT_LONG_PROMPTS, OF_EVERY_REPLAY, SKIPPED_LONG_PROMPTS
from workloads.config import LongPrompts, WorkloadConfig, trace_file
from workloads.mooncake_trace import TraceForm, TraceRow, read_trace
from workloads.timed_request import TimedRequest, request_id
from workloads.token_ids import made_token_ids

REMEMBERED_ENDS = 1 << 16
"""Number of requests whose end is remembered, least recently continued dropped first: bounds the memory of a replay."""


class PrefixSessions:
    """Derives sessions from prefixes, because the trace does not name sessions.

    A request extends an earlier prompt if all whole blocks of that prompt are the beginning of its own blocks. It
    continues the session of the longest such prompt. Prompts of up to `shared_blocks` whole blocks are not extended,
    because their blocks (a system prompt) are in every prompt. A request that extends nothing begins a session.
    """

    def __init__(self, shared_blocks: int, remembered: int = REMEMBERED_ENDS) -> None:
        self._shared_blocks = shared_blocks
        self._remembered = remembered
        self._session_of_end: OrderedDict[int, int] = OrderedDict()
        self._sessions = 0

    def of(self, whole_blocks: Sequence[int]) -> int:
        """Return the session (from 1) of a prompt with these whole blocks, and remember the prompt's end.

        A block's id stands for the block and all blocks before it, so the last whole block's id identifies a prompt.
        """
        own = whole_blocks[self._shared_blocks :]
        session = next((self._session_of_end[end] for end in reversed(own) if end in self._session_of_end), None)
        if session is None:
            self._sessions += 1
            session = self._sessions
        if own:
            self._session_of_end[own[-1]] = session
            self._session_of_end.move_to_end(own[-1])
            if len(self._session_of_end) > self._remembered:
                self._session_of_end.popitem(last=False)
        return session


class MooncakeWorkload:
    """The first `config.requests` requests of the trace that fit `max_prompt_tokens`.

    Arrivals are the trace's, divided by `time_scale` and counted from its first row. The trace has no users, so each
    session has its own. Skipped requests still count when sessions are derived.
    """

    def __init__(self, config: WorkloadConfig) -> None:
        options = config.mooncake
        if config.max_prompt_tokens < options.block_tokens:
            raise UserError(
                f"--max-prompt-tokens: {config.max_prompt_tokens} does not hold one block; "
                f"give at least --block-tokens, {options.block_tokens}"
            )
        self._config = config
        self._trace = trace_file(config)
        self._form = TraceForm(options.trace_block_tokens, options.trace_time_unit)
        self._counts: Counter[str] = Counter()
        self._block = lru_cache(maxsize=4096)(
            lambda block_id: made_token_ids(config.seed, block_id, options.block_tokens, config.vocab_size)
        )

    @property
    def requests(self) -> int:
        return self._config.requests

    def adjustments(self) -> Mapping[str, int]:
        return {name: self._counts[name] for name in OF_EVERY_REPLAY}

    def __iter__(self) -> Iterator[TimedRequest]:
        config = self._config
        sessions = PrefixSessions(config.mooncake.shared_blocks)
        self._counts = counts = Counter[str]()
        began_ms: float | None = None
        index = 0
        for row in read_trace(self._trace, config.replay.bad_rows, counts, self._form):
            began_ms = row.timestamp if began_ms is None else began_ms
            session = sessions.of(row.hash_ids[: row.input_length // self._form.block_tokens])
            prompt = self._prompt(row, counts)
            if prompt is None:
                continue
            yield TimedRequest(
                at_ms=(row.timestamp - began_ms) / config.replay.time_scale,
                request_id=request_id("mooncake", config.seed, index),
                session_id=f"user-{session:06d}/s1",
                user_id=f"user-{session:06d}",
                max_new_tokens=self._answer_tokens(row),
                prompt_token_ids=prompt,
            )
            index += 1
            if index == config.requests:
                return

    def _prompt(self, row: TraceRow, counts: Counter[str]) -> tuple[int, ...] | None:
        """The row's prompt; none if it is too long and long prompts are skipped."""
        block_tokens, limit = self._config.mooncake.block_tokens, self._config.max_prompt_tokens
        tokens = row.prompt_tokens(block_tokens, self._form)
        if tokens <= limit:
            return self._tokens(row.hash_ids)[:tokens]
        if self._config.replay.long_prompts is LongPrompts.SKIP:
            counts[SKIPPED_LONG_PROMPTS] += 1
            return None
        counts[CUT_LONG_PROMPTS] += 1
        return self._tokens(row.hash_ids[: limit // block_tokens])

    def _tokens(self, block_ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(token for block_id in block_ids for token in self._block(block_id))

    def _answer_tokens(self, row: TraceRow) -> int:
        scaled = round(row.output_length * self._config.replay.output_scale)
        return min(max(scaled, 1), self._config.max_new_tokens)

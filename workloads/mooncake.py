"""Replay of a Mooncake trace: its arrivals, its lengths scaled down, and prompts that share what the trace shares.

The trace names blocks, not text. A block becomes tokens that its id determines, so equal ids are equal tokens and the
prefixes of the trace are the prefixes of the replay. A partial last block has an id of its own in the trace, hence
the turn that later completes it shares only the whole blocks before it.
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
"""Requests whose end is remembered, most recently continued first: bounds the memory of a replay of any length."""


class PrefixSessions:
    """Sessions read off the prefixes, as the trace names none.

    A request continues the session of the longest earlier prompt it extends: one whose whole blocks, all of them, are
    the beginning of its own. Earlier prompts with no more than `shared_blocks` whole blocks are not extended by
    anybody, as what they hold (a system prompt) is in everybody's. A request that extends nothing begins a session.
    """

    def __init__(self, shared_blocks: int, remembered: int = REMEMBERED_ENDS) -> None:
        self._shared_blocks = shared_blocks
        self._remembered = remembered
        self._session_of_end: OrderedDict[int, int] = OrderedDict()
        self._sessions = 0

    def of(self, whole_blocks: Sequence[int]) -> int:
        """The session (from 1) of a prompt with these whole blocks, and remember where it ended.

        The id of a block stands for all before it, so that the id of its last whole block identifies a prompt.
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

    Arrivals are the trace's, divided by `time_scale` and counted from its first row. The trace has no users: each
    session is a user of its own. Skipped requests still take part in telling sessions apart.
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
        """The row's prompt; none where it is too long and such are skipped."""
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

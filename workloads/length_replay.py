"""Replay of a trace with arrivals and lengths but no text: the common part of the Azure and BurstGPT replays."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import ClassVar, Protocol

from workloads.adjustments import CUT_LONG_PROMPTS, OF_EVERY_REPLAY, SKIPPED_LONG_PROMPTS
from workloads.config import LongPrompts, WorkloadConfig, trace_file
from workloads.timed_request import TimedRequest, request_id
from workloads.token_ids import made_token_ids


class LengthRow(Protocol):
    """A row of such a trace. Lengths are in tokens and not scaled."""

    @property
    def at_ms(self) -> float: ...
    @property
    def session_id(self) -> str | None: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def answer_tokens(self) -> int: ...


class LengthReplay(ABC):
    """The first `config.requests` requests of the trace that fit `max_prompt_tokens`.

    Arrivals are the trace's, divided by `time_scale` and counted from the first row that is read. Lengths are the
    trace's, scaled and at least 1. Prompts are generated: each session has one stream of tokens, and its prompts are
    beginnings of that stream. So a longer prompt extends a shorter one, and equal lengths give equal prompts. Requests
    without a session share nothing. Traces name no users, so each session, or request without one, has its own user.
    """

    adjusts: ClassVar[tuple[str, ...]] = OF_EVERY_REPLAY

    def __init__(self, config: WorkloadConfig) -> None:
        self._config = config
        self._trace = trace_file(config)
        self._counts: Counter[str] = Counter()

    @abstractmethod
    def _rows(self, counts: Counter[str]) -> Iterator[LengthRow]:
        """Yield the rows of the trace, and count in `counts` what is left out."""

    @property
    def requests(self) -> int:
        return self._config.requests

    def adjustments(self) -> Mapping[str, int]:
        return {name: self._counts[name] for name in self.adjusts}

    def __iter__(self) -> Iterator[TimedRequest]:
        config = self._config
        self._counts = counts = Counter[str]()
        began_ms: float | None = None
        index = 0
        for row in self._rows(counts):
            began_ms = row.at_ms if began_ms is None else began_ms
            prompt_tokens = self._prompt_tokens(row, counts)
            if prompt_tokens is None:
                continue
            user = f"{index + 1:06d}" if row.session_id is None else f"trace-{row.session_id}"
            stream = index if row.session_id is None else f"session/{row.session_id}"
            yield TimedRequest(
                at_ms=(row.at_ms - began_ms) / config.replay.time_scale,
                request_id=request_id(config.workload, config.seed, index),
                session_id=f"user-{user}/s1",
                user_id=f"user-{user}",
                max_new_tokens=_scaled(row.answer_tokens, config.replay.output_scale, config.max_new_tokens),
                prompt_token_ids=made_token_ids(config.seed, stream, prompt_tokens, config.vocab_size),
            )
            index += 1
            if index == config.requests:
                return

    def _prompt_tokens(self, row: LengthRow, counts: Counter[str]) -> int | None:
        """Length of the row's prompt; none if it is too long and long prompts are skipped."""
        limit, scale = self._config.max_prompt_tokens, self._config.replay.prompt_scale
        if round(row.prompt_tokens * scale) > limit:
            if self._config.replay.long_prompts is LongPrompts.SKIP:
                counts[SKIPPED_LONG_PROMPTS] += 1
                return None
            counts[CUT_LONG_PROMPTS] += 1
        return _scaled(row.prompt_tokens, scale, limit)


def _scaled(tokens: int, scale: float, limit: int) -> int:
    return min(max(round(tokens * scale), 1), limit)

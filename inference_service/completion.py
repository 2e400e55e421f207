"""The results of a request: a completion with counts and times of the engine, or a failure with its reason."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from core.records import Choice, FinishReason, Request, Sampling, TokenLogprob


@dataclass(frozen=True)
class TokenEvent:
    """One token of an answer, as soon as it is chosen. An end token is no part of the answer and makes no event."""

    request: Request
    choice: int
    """Index of the answer among the `n` of the request."""
    token_id: int
    logprob: TokenLogprob | None
    text: str
    """The text that this token makes final; often empty. It never ends within a character or within what may become a
    stop string. The texts of all events are a prefix of the choice's text: what was held back is only there."""


@dataclass(frozen=True)
class Completion:
    """An answered request, with what the engine counted and timed. Times are of the engine's clock."""

    request: Request
    choices: tuple[Choice, ...]
    """As many as the request's `n`, in the order of their indices."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    """One for each computed prompt token if the request asked for them. The first is none: nothing precedes it."""
    sampling: Sampling
    prompt_tokens: int
    local_tokens: int
    remote_tokens: int
    computed_tokens: int
    decode_steps: int
    """Tokens after the first one, an end-of-sequence token included; of the choice that has most."""
    decode_rows: float | None
    """Mean number of sequences that decoded together in those steps; none without a step."""
    began_with: int
    """Sequences in the engine's rows when this one began, itself included."""
    cache_capacity_chunks: int
    cache_used_chunks: int
    arrived_ms: float
    began_ms: float
    first_token_ms: float | None
    last_token_ms: float | None
    """When the pass had been computed that gave the first token, and the last one; none without a token."""
    finished_ms: float
    """When the answer was complete: at the end of a step, which may have computed more after the last token."""

    # Most requests ask for one choice.

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        return self.choices[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason


@dataclass(frozen=True)
class Failure:
    """A request that could not be answered, and why."""

    request: Request
    reason: str


def combined(completions: Sequence[Completion]) -> Completion:
    """The completion of a request out of those of its choices, in their order.

    The first choice computed the prompt: its counts are the request's.
    """
    first, *others = completions
    if not others:
        return first
    steps = sum(one.decode_steps for one in completions)
    rows = sum(one.decode_rows * one.decode_steps for one in completions if one.decode_rows is not None)
    last = max(completions, key=lambda one: one.last_token_ms or 0.0)
    return replace(
        first,
        choices=tuple(choice for one in completions for choice in one.choices),
        decode_steps=max(one.decode_steps for one in completions),
        decode_rows=rows / steps if steps else None,
        last_token_ms=last.last_token_ms,
        finished_ms=max(one.finished_ms for one in completions),
    )


def timed_out(timeout_ms: float) -> str:
    """Why a request has no answer that has been waited for so long."""
    return f"timeout: not answered within {timeout_ms:.0f} ms; see --request-timeout-ms"

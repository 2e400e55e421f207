"""What becomes of a request: an answer with what the engine counted and timed, or a reason why there is none."""

from dataclasses import dataclass

from core.records import FinishReason, Request, Sampling, TokenLogprob


@dataclass(frozen=True)
class Completion:
    """An answered request, with what the engine counted and timed. Times are of the engine's clock."""

    request: Request
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    """Of each token, if the request asked for them."""
    finish_reason: FinishReason
    sampling: Sampling
    prompt_tokens: int
    local_tokens: int
    remote_tokens: int
    computed_tokens: int
    decode_steps: int
    """Tokens after the first one, an end-of-sequence token included."""
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


@dataclass(frozen=True)
class Failure:
    """A request that could not be answered, and why."""

    request: Request
    reason: str


def timed_out(timeout_ms: float) -> str:
    """Why a request has no answer that has been waited for so long."""
    return f"timeout: not answered within {timeout_ms:.0f} ms; see --request-timeout-ms"

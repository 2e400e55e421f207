"""A sequence in the engine: what is computed of it, where its keys and values stand, and what comes next."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cache.protocol import Prefetch
    from core.records import Request, TokenLogprob
    from inference_service.completion import Completion
    from inference_service.detokenize import StopStrings, TextStream
    from inference_service.engine import TokenListener
    from inference_service.sequence_sampler import Draw, SequenceSampler

MOST_SCORED_TOKENS = 64
"""Prompt tokens per pass where their log-probabilities are asked for: each then has logits of a whole vocabulary."""


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one sequence, at least one: of its prompt, or the one that it sampled last."""

    row: int
    start: int
    """Number of tokens that the row holds before."""
    tokens: Sequence[int]
    scored: bool = False
    """True if the logits after each of the tokens are needed, and not after the last one alone."""

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def logit_rows(self) -> int:
        """Number of rows of logits that a pass returns for the piece."""
        return len(self.tokens) if self.scored else 1


def leading_rows(pieces: Sequence[Piece]) -> int:
    """How many of the pieces, from the first on, are one token of the row of the same index."""
    in_place = (
        len(piece.tokens) == 1 and piece.row == index and not piece.scored for index, piece in enumerate(pieces)
    )
    return next((index for index, fits in enumerate(in_place) if not fits), len(pieces))


@dataclass(eq=False)
class ActiveRequest:
    """A request in the engine, with a sequence for each of its `n` answers."""

    request: "Request"
    on_token: "TokenListener | None" = None
    sequences: "list[ActiveSequence]" = field(default_factory=list)
    completions: "dict[int, Completion]" = field(default_factory=dict)
    """What is complete, by the index of the answer."""


@dataclass(eq=False)
class ActiveSequence:
    """One answer to a request, from its submission to its end, as the engine schedules it."""

    parent: ActiveRequest
    prompt: list[int]
    sampler: "SequenceSampler"
    arrived_ms: float
    expires_ms: float
    """Wall time of the request's own deadline. The answer is what there is by then."""
    times_out_ms: float
    """Wall time at which the engine times the request out."""
    weight: int
    """Maximum tokens of prompt and answer."""
    stop: "StopStrings | None" = None
    stopped_text: str | None = None
    """The answer's text, once a stop string has ended it."""
    choice: int = 0
    """Index of the answer among the `n` of its request."""
    stream: "TextStream | None" = None
    """Its text so far, if the request's tokens are told as they come."""
    queued: bool = False
    """True while it is in the scheduler's queue."""
    left: bool = False
    """True once it is out of the engine."""
    arrival: int = 0
    """Rank among all requests."""
    prefetch: "Prefetch | None" = None
    """Its chunks that are being fetched from Redis while it is queued."""
    waited_for_reuse: bool = False
    """True once it has waited for a chunk that another request was about to compute."""
    row: int = -1
    began_ms: float = 0.0
    began_with: int = 1
    first_token_ms: float | None = None
    computed_ms: float = 0.0
    """Wall time at the end of its latest pass. The step may go on after it."""
    local_tokens: int = 0
    remote_tokens: int = 0
    capacity_chunks: int = 0
    used_chunks: int = 0
    output: list[int] = field(default_factory=list)
    logprobs: list["TokenLogprob"] = field(default_factory=list)
    """One for each token of `output`, if the request asked for them."""
    prompt_logprobs: list["TokenLogprob"] = field(default_factory=list)
    """One for each computed token of the prompt but the first, if the request asked for them."""
    held: int = 0
    """Tokens whose keys and values are in the sequence's row: all but the last sampled one."""
    finite: int = 0
    """Number of leading `held` tokens that are known to have finite keys and values."""
    touched: int = 0
    """End of the positions of its row that a pass may have written."""
    rows_decoded: int = 0
    """Sum of the batch sizes of its decode steps."""

    long: bool = False
    """True if its prompt, without reused chunks, exceeds the token budget of a step."""
    ms_per_token: float = 0.0
    """Cost of the latest piece of a long prompt."""
    piece_tokens: int = 0
    """Prompt tokens to compute in the current step."""

    @property
    def request(self) -> "Request":
        return self.parent.request

    @property
    def leader(self) -> "ActiveSequence | None":
        """The first choice of its request, which computes the prompt for all; none for the first choice itself."""
        return self.parent.sequences[0] if self.choice else None

    @property
    def ends_ms(self) -> float:
        """Wall time at which it leaves the engine at the latest."""
        return min(self.expires_ms, self.times_out_ms)

    @property
    def is_scored(self) -> bool:
        """True if log-probabilities of its prompt are asked for."""
        return self.request.prompt_logprobs is not None and self.leader is None

    @property
    def reuses(self) -> bool:
        """False if every token of its prompt must be computed, because its logits are asked for."""
        return not self.is_scored

    @property
    def most_piece_tokens(self) -> int:
        """Maximum size of a piece of its prompt."""
        return MOST_SCORED_TOKENS if self.is_scored else len(self.prompt)

    @property
    def is_fetching(self) -> bool:
        """True while chunks of its prompt may still arrive from Redis in time."""
        return self.prefetch is not None and not self.prefetch.ready

    @property
    def missing(self) -> int:
        """Number of prompt tokens that are not computed yet."""
        return len(self.prompt) - self.held

    @property
    def ends_prompt(self) -> bool:
        """True if the current step computes the rest of its prompt."""
        return self.piece_tokens == self.missing

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output

    @property
    def draw(self) -> "Draw | None":
        """The token to draw in the current step; none before the last piece of the prompt."""
        return self.sampler.draw(self.output) if self.output or self.ends_prompt else None

    @property
    def piece(self) -> Piece:
        """Its tokens to compute in the current step: a piece of the prompt, or the last sampled token."""
        if self.output:
            return Piece(self.row, self.held, self.output[-1:])
        return Piece(self.row, self.held, self.prompt[self.held : self.held + self.piece_tokens], self.is_scored)

"""A request in the engine: what is computed of it, where its keys and values stand, and what comes next."""

from dataclasses import dataclass, field

from cache.protocol import Prefetch
from core.records import Request, TokenLogprob
from inference_service.pieces import Piece
from inference_service.sampling import Draw, SequenceSampler
from inference_service.stop_strings import StopStrings


@dataclass(eq=False)
class ActiveSequence:
    """A request from its submission to its end, as the engine schedules it."""

    request: Request
    prompt: list[int]
    sampler: SequenceSampler
    arrived_ms: float
    expires_ms: float
    """Wall time of the request's own deadline. The answer is what there is by then."""
    times_out_ms: float
    """Wall time at which the engine times the request out."""
    weight: int
    """Maximum tokens of prompt and answer."""
    stop: StopStrings | None = None
    stopped_text: str | None = None
    """The answer's text, once a stop string has ended it."""
    prefetch: Prefetch | None = None
    """Its chunks that are being fetched from Redis while it is queued."""
    waited_for_reuse: bool = False
    """Whether it has waited once for a chunk that another request was about to compute."""
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
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """One for each token of `output`, if the request asked for them."""
    held: int = 0
    """Tokens whose keys and values are in the sequence's row: all but the last sampled one."""
    finite: int = 0
    """Number of leading `held` tokens that are known to have finite keys and values."""
    touched: int = 0
    """End of the positions of its row that a pass may have written."""
    rows_decoded: int = 0
    """Sum of the batch sizes of its decode steps."""

    long: bool = False
    """Whether its prompt, without reused chunks, exceeds the token budget of a step."""
    ms_per_token: float = 0.0
    """Cost of the latest piece of a long prompt."""
    piece_tokens: int = 0
    """Prompt tokens to compute in the current step."""

    @property
    def ends_ms(self) -> float:
        """Wall time at which it leaves the engine at the latest."""
        return min(self.expires_ms, self.times_out_ms)

    @property
    def is_fetching(self) -> bool:
        """Whether chunks of its prompt may still arrive from Redis in time."""
        return self.prefetch is not None and not self.prefetch.ready

    @property
    def missing(self) -> int:
        """Number of prompt tokens that are not computed yet."""
        return len(self.prompt) - self.held

    @property
    def ends_prompt(self) -> bool:
        """Whether the current step computes the rest of its prompt."""
        return self.piece_tokens == self.missing

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output

    @property
    def draw(self) -> Draw | None:
        """The token to draw in the current step; none before the last piece of the prompt."""
        return Draw(self.sampler, self.output) if self.output or self.ends_prompt else None

    @property
    def piece(self) -> Piece:
        """Its tokens to compute in the current step: a piece of the prompt, or the last sampled token."""
        tokens = self.output[-1:] or self.prompt[self.held : self.held + self.piece_tokens]
        return Piece(self.row, self.held, tokens)

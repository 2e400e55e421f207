"""A request in the engine: what is computed of it, where its keys and values stand, and what comes next."""

from dataclasses import dataclass, field

from cache.protocol import Prefetch
from core.records import Request
from inference_service.pieces import Piece
from inference_service.sampling import Draw, SequenceSampler


@dataclass(eq=False)
class ActiveSequence:
    """A request from its submission to its end, as the engine schedules it."""

    request: Request
    prompt: list[int]
    sampler: SequenceSampler
    arrived_ms: float
    expires_ms: float
    """When its own deadline passes: what there is by then is the answer."""
    times_out_ms: float
    """When the engine gives it up."""
    weight: int
    """Tokens that it may come to hold."""
    prefetch: Prefetch | None = None
    """Its chunks on their way from Redis while it waits."""
    waited_for_reuse: bool = False
    """Whether it was held back once, for a chunk that another request was about to compute."""
    row: int = -1
    began_ms: float = 0.0
    began_with: int = 1
    first_token_ms: float | None = None
    computed_ms: float = 0.0
    """Wall time at which its latest pass had been computed: its token is there, whatever the step goes on to do."""
    local_tokens: int = 0
    remote_tokens: int = 0
    capacity_chunks: int = 0
    used_chunks: int = 0
    output: list[int] = field(default_factory=list)
    held: int = 0
    """Tokens whose key/value stand in the sequence's row: all but the last sampled one."""
    finite: int = 0
    """Of those, how many from the first on are known to have finite keys and values."""
    touched: int = 0
    """Positions of its row that a pass may have written, up to this one."""
    rows_decoded: int = 0
    """Sum, over its decode steps, of the sequences that decoded in them."""

    long: bool = False
    """Whether what was missing of its prompt at the beginning is more than a step computes."""
    ms_per_token: float = 0.0
    """Of a long one's latest piece."""
    piece_tokens: int = 0
    """Of its prompt, in the step that is under way."""

    @property
    def ends_ms(self) -> float:
        """When it leaves the engine at the latest."""
        return min(self.expires_ms, self.times_out_ms)

    @property
    def is_fetching(self) -> bool:
        """Whether more of its prompt may come from Redis in time."""
        return self.prefetch is not None and not self.prefetch.ready

    @property
    def missing(self) -> int:
        """Prompt tokens that are still to be computed."""
        return len(self.prompt) - self.held

    @property
    def ends_prompt(self) -> bool:
        """Whether the step that is under way computes the rest of its prompt."""
        return self.piece_tokens == self.missing

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output

    @property
    def draw(self) -> Draw | None:
        """The token that the step which is under way is to give; none before the prompt's last piece."""
        return Draw(self.sampler, self.output) if self.output or self.ends_prompt else None

    @property
    def piece(self) -> Piece:
        """What the step that is under way computes of it: of its prompt, or the token that it sampled last."""
        tokens = self.output[-1:] or self.prompt[self.held : self.held + self.piece_tokens]
        return Piece(self.row, self.held, tokens)

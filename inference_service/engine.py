"""What a slot needs of an engine.

An engine of another kind is a module of its own with a function `make`, and one line in `inference_service.registry`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from core.clock import Clock
from core.records import Request
from inference_service.completion import Completion, Failure, TokenEvent
from inference_service.config import EngineConfig
from inference_service.registry import ENGINES
from inference_service.stats import EngineStats

if TYPE_CHECKING:
    from cache.protocol import ChunkShape, KVCache, ModelIdentity

TokenListener = Callable[[TokenEvent], None]
"""Called in `step` for each token of an answer. If it raises, the request fails."""


@dataclass(frozen=True)
class EngineInfo:
    """What an engine is, for results."""

    engine: str
    """Name and version."""
    model: str
    device: str
    dtype: str
    """Data type of weights, keys and values."""
    chunk_bytes: int
    """Size of one cached chunk; 0 where the engine shows none."""


class Engine(Protocol):
    """Answers requests, several at a time. Single-threaded: call everything from one thread."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def unfinished(self) -> int:
        """Requests without a result."""
        ...

    @property
    def stats(self) -> EngineStats:
        """Current counters. May be read between two passes of a step."""
        ...

    @property
    def waiting_since_ms(self) -> float | None:
        """Arrival (wall time) of the request that has waited longest; none if none waits.

        A request waits until the last of its choices has begun.
        """
        ...

    def submit(self, request: Request, arrived_ms: float, on_token: TokenListener | None = None) -> None:
        """Queue a request that arrived at this wall time. `on_token` is told of its tokens as they come.

        Raises `UserError` for a request that this model cannot answer.
        """
        ...

    def cancel(self, request: Request) -> bool:
        """Drop this very object. No result follows. To be called between two steps.

        Returns false if it is not in the engine, for instance because it has finished.
        """
        ...

    def step(self) -> list[Completion | Failure]:
        """Compute for a moment: tens of milliseconds, not a whole answer. Returns the requests that have finished."""
        ...

    def warm_up(self) -> None:
        """Pay the costs of first calls, in an idle engine."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class EngineSetting:
    """What a slot gives to its engine beside the configuration."""

    slot: int
    threads: int
    """CPU threads that it may use."""
    chunk_tokens: int
    clock: Clock
    open_cache: Callable[["ChunkShape", "ModelIdentity"], "KVCache"] | None = None
    """Opens the slot's cache; none where nothing is cached."""
    on_begin: Callable[[Sequence[Request]], None] = lambda requests: None
    """To be called before anything is computed or looked up for requests that have waited."""
    on_pass: Callable[[], None] = lambda: None
    """To be called after each pass: a sign of life."""


MakeEngine = Callable[[EngineConfig, EngineSetting], Engine]


def make_engine(config: EngineConfig, setting: EngineSetting) -> Engine:
    """Load the model of `config` into an engine of its kind. Raises `UserError` where that cannot be."""
    make: MakeEngine = ENGINES.load(config.engine)
    return make(config, setting)

"""The interface between the cache and a sizing policy."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from cache.config import SizingConfig


class SizingPolicy(Protocol):
    """Decides how many chunks the local tier may hold. It does not know which chunks the tier holds."""

    @property
    def capacity_chunks(self) -> int:
        """The latest decision; before the first one, the configured capacity."""
        ...

    def observe(self, now_ms: float, keys: Sequence[bytes]) -> int:
        """Record that a request looked up `keys` at `now_ms`, and return the capacity from now on, in chunks.

        `keys` are those of the prompt's full chunks; there may be none. `now_ms` never decreases. Each call is one
        request.
        """
        ...


@runtime_checkable
class StoreObserver(Protocol):
    """A sizing policy that also needs to know what is stored."""

    def observe_stored(self, keys: Sequence[bytes]) -> None:
        """Record that `keys`, of a prompt and its answer, were offered to the local tier. This counts as a use."""
        ...


def clamp(capacity_chunks: int, config: SizingConfig) -> int:
    """`capacity_chunks`, limited to the range that a policy may set."""
    return max(config.min_capacity_chunks, min(capacity_chunks, config.max_capacity_chunks))

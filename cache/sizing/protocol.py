"""What a cache tells a sizing policy, and what it asks of it."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from cache.config import SizingConfig


class SizingPolicy(Protocol):
    """Decides how many chunks the local tier may hold. Knows nothing of what the tier holds."""

    @property
    def capacity_chunks(self) -> int:
        """The capacity as it was last decided; at first what the configuration begins with."""
        ...

    def observe(self, now_ms: float, keys: Sequence[bytes]) -> int:
        """One request looked up `keys` (its full chunks; maybe none) at `now_ms`; the capacity from now on.

        `now_ms` never goes back. Every call counts as one request.
        """
        ...


@runtime_checkable
class StoreObserver(Protocol):
    """A sizing policy that follows what the tier holds: it is told of what is stored as well."""

    def observe_stored(self, keys: Sequence[bytes]) -> None:
        """`keys`, of a prompt and of its answer, were offered to the local tier and have been used."""
        ...


def clamp(capacity_chunks: int, config: SizingConfig) -> int:
    """`capacity_chunks` within the least and the greatest that a policy may set."""
    return max(config.min_capacity_chunks, min(capacity_chunks, config.max_capacity_chunks))

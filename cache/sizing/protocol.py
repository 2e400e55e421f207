"""What a cache tells a sizing policy, and what it asks of it."""

from collections.abc import Sequence
from typing import Protocol

from core.config import SizingConfig


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


def clamp(capacity_chunks: int, config: SizingConfig) -> int:
    """`capacity_chunks` within the least and the greatest that a policy may set."""
    return max(config.min_capacity_chunks, min(capacity_chunks, config.max_capacity_chunks))

"""What the local tier tells an eviction policy, and what it asks of it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence


class EvictionPolicy(ABC):
    """An order over the keys that the local tier holds. Knows neither leases nor tensors.

    Policies inherit from this class: what one has no use for does nothing. In all of it a prompt's chunks are given
    from its first to its last. Without its first the others are of no use, so that of chunks that are else equal the
    last of a prompt leaves first.
    """

    ghosts_per_chunk: int = 0
    """How many keys that are not in the tier the policy remembers at most, as a multiple of the capacity."""

    def on_resize(self, capacity_chunks: int) -> None:
        """The tier may hold this many chunks from now on; told once before anything else, then at every change."""

    def on_request(self, keys: Sequence[bytes]) -> None:
        """A prompt asked for `keys`: one use of each, of those too that are not in the tier. Some may come in soon."""

    def admits(self, key: bytes) -> bool:
        """Whether `key`, which is not in the tier, may take the place of the first of `victims`."""
        return True

    def on_insert(self, key: bytes) -> None:
        """`key` is in the tier now; it was not before."""

    def arrange(self, keys: Sequence[bytes]) -> None:
        """`keys`, some of them new, are in the tier and of one prompt; no further use: let the last leave first."""

    def on_remove(self, key: bytes) -> None:
        """`key`, which was in the tier, has been evicted."""

    @abstractmethod
    def victims(self) -> Iterator[bytes]:
        """Every key of the tier once, the first to leave first. Valid until the next call that changes the order.

        The tier takes the first that no lease holds, and reports it by `on_remove`.
        """
        ...

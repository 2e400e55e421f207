"""The interface between the local tier and an eviction policy."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence


class EvictionPolicy(ABC):
    """Orders the keys of the chunks in the local tier. It knows neither tensors nor which chunks are in use.

    Policies inherit from this class. A method that a policy does not need does nothing by default. All methods take a
    prompt's keys in the order of the prompt. A chunk is useless without the chunks before it, so among chunks that are
    otherwise equal, the last chunk of a prompt leaves first.
    """

    ghosts_per_chunk: int = 0
    """Maximum number of keys outside the tier that the policy remembers, as a multiple of the capacity."""

    def on_resize(self, capacity_chunks: int) -> None:
        """The tier may hold this many chunks from now on. Called before all other methods, then at every change."""

    def on_request(self, keys: Sequence[bytes]) -> None:
        """A prompt looked up `keys`. This is one use of each key, whether or not it is in the tier."""

    def admits(self, key: bytes) -> bool:
        """True if `key`, which is not in the tier, may replace the first of `victims`."""
        return True

    def on_insert(self, key: bytes) -> None:
        """`key` has been added to the tier."""

    def arrange(self, keys: Sequence[bytes]) -> None:
        """`keys`, old and new ones, belong to one prompt: let its last leave first. This does not count as a use."""

    def on_remove(self, key: bytes) -> None:
        """`key` has been evicted from the tier."""

    @abstractmethod
    def victims(self) -> Iterator[bytes]:
        """Every key in the tier once, the first to leave first. Valid until the next call that changes the order.

        The tier evicts the first chunk that is not in use, and reports it to `on_remove`.
        """
        ...

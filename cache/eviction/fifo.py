"""First in, first out."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from cache.eviction.protocol import EvictionPolicy


class FIFO(EvictionPolicy):
    """Evicts the key that was inserted first, however often it was used. Each call takes O(1) per key."""

    def __init__(self) -> None:
        self._oldest_first: OrderedDict[bytes, None] = OrderedDict()
        self._new: set[bytes] = set()
        """Keys inserted since the last call of `arrange`. The new keys of one prompt count as one arrival."""

    def on_insert(self, key: bytes) -> None:
        self._oldest_first[key] = None
        self._new.add(key)

    def arrange(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):
            if key in self._new:
                self._oldest_first.move_to_end(key)
        self._new.clear()

    def on_request(self, keys: Sequence[bytes]) -> None:
        self._new.clear()

    def on_remove(self, key: bytes) -> None:
        del self._oldest_first[key]
        self._new.discard(key)

    def victims(self) -> Iterator[bytes]:
        return iter(self._oldest_first)

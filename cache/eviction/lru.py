"""Least recently used."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from cache.eviction.protocol import EvictionPolicy


class LRU(EvictionPolicy):
    """Evicts the key that was inserted or used the longest ago. Each call takes O(1) per key."""

    def __init__(self) -> None:
        self._oldest_first: OrderedDict[bytes, None] = OrderedDict()

    def on_request(self, keys: Sequence[bytes]) -> None:
        held = self._oldest_first
        for key in reversed(keys):
            if key in held:
                held.move_to_end(key)

    def on_insert(self, key: bytes) -> None:
        self._oldest_first[key] = None

    def arrange(self, keys: Sequence[bytes]) -> None:
        self.on_request(keys)

    def on_remove(self, key: bytes) -> None:
        del self._oldest_first[key]

    def victims(self) -> Iterator[bytes]:
        return iter(self._oldest_first)

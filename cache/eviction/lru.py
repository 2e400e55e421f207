"""Least recently used."""

from collections import OrderedDict
from collections.abc import Iterator


class LRU:
    """The key whose last insertion or access lies furthest back leaves first. O(1) for every event."""

    def __init__(self) -> None:
        self._oldest_first: OrderedDict[bytes, None] = OrderedDict()

    def on_insert(self, key: bytes) -> None:
        self._oldest_first[key] = None

    def on_access(self, key: bytes) -> None:
        self._oldest_first.move_to_end(key)

    def on_remove(self, key: bytes) -> None:
        del self._oldest_first[key]

    def victims(self) -> Iterator[bytes]:
        return iter(self._oldest_first)

"""Least frequently used."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain

from cache.eviction.protocol import EvictionPolicy


class LFU(EvictionPolicy):
    """Evicts the key with the fewest uses since its insertion; among equals, the key that reached that count first.

    The count of a key never fades while the key is in the tier, and is lost when it leaves. Each call takes O(1) per
    key, except for finding the lowest count, which takes O(distinct counts).
    """

    def __init__(self) -> None:
        self._uses: dict[bytes, int] = {}
        self._oldest_first: dict[int, OrderedDict[bytes, None]] = {}
        """For each number of uses, the keys that have it."""

    def on_request(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):
            uses = self._uses.get(key)
            if uses is not None:
                self._leave(key, uses)
                self._enter(key, uses + 1)

    def on_insert(self, key: bytes) -> None:
        self._enter(key, 1)

    def arrange(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):
            uses = self._uses.get(key)
            if uses is not None:
                self._oldest_first[uses].move_to_end(key)

    def on_remove(self, key: bytes) -> None:
        self._leave(key, self._uses.pop(key))

    def victims(self) -> Iterator[bytes]:
        if not self._uses:
            return iter(())
        # Callers mostly need the first victims only, so higher counts are sorted when the lowest is used up.
        least = min(self._oldest_first)
        return chain(self._oldest_first[least], self._above(least))

    def _above(self, least: int) -> Iterator[bytes]:
        for uses in sorted(self._oldest_first):
            if uses > least:
                yield from self._oldest_first[uses]

    def _enter(self, key: bytes, uses: int) -> None:
        self._uses[key] = uses
        self._oldest_first.setdefault(uses, OrderedDict())[key] = None

    def _leave(self, key: bytes, uses: int) -> None:
        equals = self._oldest_first[uses]
        del equals[key]
        if not equals:
            del self._oldest_first[uses]

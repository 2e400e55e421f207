"""Least frequently used."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain

from cache.eviction.protocol import EvictionPolicy


class LFU(EvictionPolicy):
    """The key with the fewest uses since it came in leaves first; of equals, the one that reached them first.

    A frequency forgets nothing while its key is in, and all when it leaves. O(1) for every event, but for the search
    of the least frequency, which is over the distinct frequencies.
    """

    def __init__(self) -> None:
        self._uses: dict[bytes, int] = {}
        self._oldest_first: dict[int, OrderedDict[bytes, None]] = {}
        """For each number of uses that some key has, those keys."""

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
        # Only the first is asked for, most of the time: the others are sorted when it is used up.
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

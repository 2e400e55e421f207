"""Adaptive replacement cache (Megiddo and Modha, FAST 2003)."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import islice

from cache.eviction.protocol import EvictionPolicy


class ARC(EvictionPolicy):
    """Keeps two LRU lists: keys used once, and keys used again. Keys that return show which list needs more room.

    The names are the paper's. `t1` and `t2` are the two lists of keys in the tier. `b1` and `b2` remember keys that
    were evicted from them. `p` is the target size of `t1`: a key that returns from `b1` raises it, a key that returns
    from `b2` lowers it. All four lists together hold at most twice the capacity. One rule differs from the paper: a
    key from `b2` does not break a tie between the lists, because the tier makes room before the policy learns which
    key comes in. Each call takes O(1) per key.
    """

    ghosts_per_chunk = 2

    def __init__(self) -> None:
        self._capacity = 0
        self._p = 0.0
        self._t1: OrderedDict[bytes, None] = OrderedDict()
        self._t2: OrderedDict[bytes, None] = OrderedDict()
        self._b1: OrderedDict[bytes, None] = OrderedDict()
        self._b2: OrderedDict[bytes, None] = OrderedDict()

    def on_resize(self, capacity_chunks: int) -> None:
        self._capacity = capacity_chunks
        self._p = min(self._p, capacity_chunks)
        self._forget()

    def on_request(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):
            if key in self._t1:
                del self._t1[key]
                self._t2[key] = None
            elif key in self._t2:
                self._t2.move_to_end(key)

    def on_insert(self, key: bytes) -> None:
        if key in self._b1:
            self._p = min(self._p + max(1.0, len(self._b2) / len(self._b1)), self._capacity)
            del self._b1[key]
            self._t2[key] = None
        elif key in self._b2:
            self._p = max(self._p - max(1.0, len(self._b1) / len(self._b2)), 0.0)
            del self._b2[key]
            self._t2[key] = None
        else:
            self._t1[key] = None
            self._forget()

    def arrange(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):
            for held in (self._t1, self._t2):
                if key in held:
                    held.move_to_end(key)

    def on_remove(self, key: bytes) -> None:
        held, remembered = (self._t1, self._b1) if key in self._t1 else (self._t2, self._b2)
        del held[key]
        remembered[key] = None
        self._forget()

    def victims(self) -> Iterator[bytes]:
        # First the excess of `t1` over its target, then all of `t2`, then the rest of `t1`.
        above = len(self._t1) - int(self._p) if self._t1 else 0
        above = max(above, 0)
        yield from islice(self._t1, above)
        yield from self._t2
        yield from islice(self._t1, above, None)

    def _forget(self) -> None:
        while self._b1 and len(self._t1) + len(self._b1) > self._capacity:
            self._b1.popitem(last=False)
        held = len(self._t1) + len(self._t2)
        while self._b2 and held + len(self._b1) + len(self._b2) > 2 * self._capacity:
            self._b2.popitem(last=False)

"""The hits that an LRU tier of any capacity would have had, measured in one pass over the accesses."""

import math
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

NEVER = math.inf
"""Depth of an unknown key: no capacity would have held it."""
_KEY_VALUES = 1 << 64
_PENDING = 4096
_ROUNDING = 1e-9

Floats = npt.NDArray[np.float64]


class MissRatioCurve:
    """Counts hits over capacity for a stream of lookups, by the depth of each key in the LRU stack.

    A tier of `c` chunks holds the top `c` keys of the stack. So an access is a hit at every capacity that is at least
    its depth (Mattson et al., 1970). A Fenwick tree over the order of last accesses counts depths in O(log n) per
    access. A lookup is measured against the stack before it. Then its keys move to the top, with the first key
    uppermost, as in the local tier, where a prompt's first chunk leaves last.

    At most `tracked_keys` keys are tracked. If `greatest_chunks` is not larger, hits up to that capacity are exact.
    Otherwise only keys whose hash is below a threshold are tracked. `rate` is their share, and a depth among them is
    scaled by its inverse. This is spatial sampling as in SHARDS (Waldspurger et al., FAST'15). As there, the hits at
    the first depth are corrected if the sample has more or fewer accesses than its share.

    The memory is a few numbers for each tracked key and for each depth.
    """

    def __init__(self, greatest_chunks: int, tracked_keys: int) -> None:
        self._tracked = max(1, min(tracked_keys, greatest_chunks))
        self.rate = min(1.0, tracked_keys / greatest_chunks) if greatest_chunks else 1.0
        self._threshold = math.ceil(self.rate * _KEY_VALUES)
        self._stack: OrderedDict[bytes, int] = OrderedDict()
        """Place of the last access of each known key, the oldest first."""
        self._places = 1 << (2 * self._tracked - 1).bit_length()
        self._tree = [0] * (self._places + 1)
        self._next_place = 1
        self._hits_at_depth: Floats = np.zeros(self._tracked + 1)
        self._pending: list[int] = []
        self._sampled = 0.0
        self.accesses = 0.0
        """Number of keys looked up. Old lookups fade."""
        self.seconds = 0.0
        """Time from the first lookup to the last. Old time fades."""
        self._now_ms: float | None = None

    def __len__(self) -> int:
        """Number of tracked keys; at most `tracked_keys`."""
        return len(self._stack)

    def look_up(self, now_ms: float, keys: Sequence[bytes]) -> list[float]:
        """Count one lookup of distinct `keys`. Returns for each sampled key the smallest capacity, in chunks, of a hit.

        `now_ms` never decreases.
        """
        if self._now_ms is not None:
            self.seconds += (now_ms - self._now_ms) / 1000
        self._now_ms = now_ms
        self.accesses += len(keys)
        depths = self._use(keys)
        self._sampled += len(depths)
        self._pending += depths
        if len(self._pending) > _PENDING:
            self._count_pending()
        return self._in_chunks(depths)

    def put(self, keys: Sequence[bytes]) -> list[float]:
        """Move distinct `keys`, which were stored, to the top. Returns what `look_up` does, and counts no access."""
        return self._in_chunks(self._use(keys))

    def age(self, weight: float) -> None:
        """Multiply the weight of all counts so far by `weight`."""
        self._count_pending()
        self._hits_at_depth *= weight
        self._sampled *= weight
        self.accesses *= weight
        self.seconds *= weight

    def hits(self, capacities: npt.ArrayLike) -> Floats:
        """How many of `accesses` would have been hits, for each of the ascending `capacities` in chunks."""
        self._count_pending()
        chunks = np.asarray(capacities)
        if not self.accesses:
            return np.zeros(chunks.shape)
        # Depth 0 counts unknown keys.
        within = np.cumsum(self._hits_at_depth) - self._hits_at_depth[0]
        depths = np.floor((chunks - 1) * self.rate + _ROUNDING).astype(int) + 1
        found = within[np.clip(depths, 0, self._tracked)]
        # A key that all prompts share is near the top, and all of its accesses are sampled or none: correct there.
        found = np.where(chunks > 0, found + self.accesses * self.rate - self._sampled, 0.0)
        return np.clip(np.maximum.accumulate(found) / self.rate, 0.0, self.accesses)

    def _use(self, keys: Sequence[bytes]) -> list[int]:
        """Move the sampled `keys` to the top. Returns their depths before, as `_depths` does."""
        if self.rate < 1:
            threshold = self._threshold
            keys = [key for key in keys if int.from_bytes(key[-8:], "little") < threshold]
        depths = self._depths(keys)
        self._put_on_top(keys)
        return depths

    def _in_chunks(self, depths: Sequence[int]) -> list[float]:
        if self.rate < 1:
            return [(depth - 1) / self.rate + 1 if depth else NEVER for depth in depths]
        return [depth or NEVER for depth in depths]

    def _depths(self, keys: Sequence[bytes]) -> list[int]:
        """Depth of each key: 1 at the top, 0 for an unknown key."""
        stack, tree, known = self._stack, self._tree, len(self._stack)
        depths = []
        for key in keys:
            place = stack.get(key, 0) - 1
            if place < 0:
                depths.append(0)
                continue
            below = 0
            while place:
                below += tree[place]
                place &= place - 1
            depths.append(known - below)
        return depths

    def _put_on_top(self, keys: Sequence[bytes]) -> None:
        stack = self._stack
        for key in reversed(keys):
            if self._next_place > self._places:
                self._renumber()
            place = stack.pop(key, 0)
            if place:
                self._add(place, -1)
            elif len(stack) == self._tracked:
                self._add(stack.popitem(last=False)[1], -1)
            stack[key] = self._next_place
            self._add(self._next_place, 1)
            self._next_place += 1

    def _add(self, place: int, count: int) -> None:
        tree, places = self._tree, self._places
        while place <= places:
            tree[place] += count
            place += place & -place

    def _renumber(self) -> None:
        """Close the gaps that moved keys left. After that, at most half of the places are taken."""
        known = len(self._stack)
        for place, key in enumerate(self._stack, start=1):
            self._stack[key] = place
        # A node of a Fenwick tree counts the places (node - lowest bit of node, node].
        self._tree = [max(0, min(node, known) - (node - (node & -node))) for node in range(self._places + 1)]
        self._next_place = known + 1

    def _count_pending(self) -> None:
        if self._pending:
            self._hits_at_depth += np.bincount(self._pending, minlength=self._tracked + 1)
            self._pending.clear()

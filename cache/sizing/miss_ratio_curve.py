"""How many hits a least-recently-used tier of any capacity would have had, from one pass over the accesses."""

import math
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

NEVER = math.inf
"""Depth of a key that is not known: no capacity would have held it."""
_KEY_VALUES = 1 << 64
_PENDING = 4096
_ROUNDING = 1e-9

Floats = npt.NDArray[np.float64]


class MissRatioCurve:
    """Hits over capacity of a stream of look-ups, by the depth at which each key lies in the LRU stack.

    A tier of `c` chunks holds the uppermost `c` keys of the stack, so that an access is a hit of every capacity from
    its depth on (Mattson et al., 1970). Depths are counted by a Fenwick tree over the order of last accesses: O(log n)
    an access. A look-up is measured against the stack as it was before it, and then lies on top, its first key
    uppermost: as `LocalTier.touch` has it, where a prompt's first chunk leaves last.

    At most `tracked_keys` keys are remembered. Where `greatest_chunks` is no more than that, hits up to it are exact.
    Where it is more, only keys whose hash falls below a threshold are followed, and a depth among them stands for one
    that is larger by the inverse of their share, `rate`: spatial sampling as in SHARDS (Waldspurger et al., FAST'15),
    with its correction of the first depth for a sample that has drawn more or fewer accesses than its share.

    Memory: a few numbers for each tracked key and for each depth.
    """

    def __init__(self, greatest_chunks: int, tracked_keys: int) -> None:
        self._tracked = max(1, min(tracked_keys, greatest_chunks))
        self.rate = min(1.0, tracked_keys / greatest_chunks) if greatest_chunks else 1.0
        self._threshold = math.ceil(self.rate * _KEY_VALUES)
        self._stack: OrderedDict[bytes, int] = OrderedDict()
        """Place of each known key's last access, the oldest first."""
        self._places = 1 << (2 * self._tracked - 1).bit_length()
        self._tree = [0] * (self._places + 1)
        self._next_place = 1
        self._hits_at_depth: Floats = np.zeros(self._tracked + 1)
        self._pending: list[int] = []
        self._sampled = 0.0
        self.accesses = 0.0
        """Keys looked up, aged."""
        self.seconds = 0.0
        """Time from the first look-up to the last, aged."""
        self._now_ms: float | None = None

    def __len__(self) -> int:
        """Keys that are remembered; never above `tracked_keys`."""
        return len(self._stack)

    def look_up(self, now_ms: float, keys: Sequence[bytes]) -> list[float]:
        """Count one look-up of distinct `keys`; the least capacity, in chunks, that each sampled one was a hit of.

        `now_ms` never goes back.
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
        """Distinct `keys` were stored, and lie on top now; how deep each sampled one lay before. Counts no access."""
        return self._in_chunks(self._use(keys))

    def age(self, weight: float) -> None:
        """What was counted so far counts for `weight` of itself from now on."""
        self._count_pending()
        self._hits_at_depth *= weight
        self._sampled *= weight
        self.accesses *= weight
        self.seconds *= weight

    def hits(self, capacities: npt.ArrayLike) -> Floats:
        """How many of `accesses` a tier would have hit, for each of the ascending `capacities` in chunks."""
        self._count_pending()
        chunks = np.asarray(capacities)
        if not self.accesses:
            return np.zeros(chunks.shape)
        # Depth 0 stands for keys that were not known.
        within = np.cumsum(self._hits_at_depth) - self._hits_at_depth[0]
        depths = np.floor((chunks - 1) * self.rate + _ROUNDING).astype(int) + 1
        found = within[np.clip(depths, 0, self._tracked)]
        # A key that all prompts share is sampled or not as a whole, and lies near the top: what is missing lay there.
        found = np.where(chunks > 0, found + self.accesses * self.rate - self._sampled, 0.0)
        return np.clip(np.maximum.accumulate(found) / self.rate, 0.0, self.accesses)

    def _use(self, keys: Sequence[bytes]) -> list[int]:
        """Lay the sampled ones of `keys` on top; their depths before, as `_depths` has them."""
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
        """1 for the uppermost; 0 for a key that is not known."""
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
        """Close the gaps that moved keys have left: at most half of the places are taken then."""
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

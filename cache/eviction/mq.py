"""Multi-queue (Zhou, Philbin and Li, USENIX ATC 2001), designed for second-level caches, where reuse comes late."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain

from cache.eviction.protocol import EvictionPolicy

QUEUES = 8
DISTANCES = 64
"""Number of octaves in which distances are counted."""
LEAST_TURNOVER = 1024
"""Minimum number of uses between two updates of `life`, however small the tier is."""


class MQ(EvictionPolicy):
    """One LRU queue for each octave of use counts. The victim comes from the lowest queue that is not empty.

    A key that goes unused for `life` uses of any keys moves down by one queue. The use count of an evicted key is
    remembered for a while. As in the paper, `life` is the most frequent distance between two uses of the same key. It
    is learned from a histogram of distances in octaves. The histogram is halved each time the tier turns over, so that
    old distances fade. Each call takes O(1) per key.
    """

    ghosts_per_chunk = 4
    """As in the paper."""

    def __init__(self) -> None:
        self._capacity = 0
        self._now = 0
        self._queues: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in range(QUEUES)]
        self._queue_of: dict[bytes, int] = {}
        self._sinks_at: dict[bytes, int] = {}
        self._uses: dict[bytes, int] = {}
        self._used_at: dict[bytes, int] = {}
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()
        self._distances = [0] * DISTANCES
        self._life = 0

    def on_resize(self, capacity_chunks: int) -> None:
        self._capacity = capacity_chunks
        self._life = self._life or capacity_chunks
        self._forget()

    def on_request(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):
            self._now += 1
            if key in self._used_at:
                self._distances[(self._now - self._used_at[key]).bit_length()] += 1
                self._uses[key] += 1
                self._used_at[key] = self._now
            if key in self._queue_of:
                self._leave_queue(key)
                self._enter(key)
            self._sink()

    def on_insert(self, key: bytes) -> None:
        if key in self._ghosts:
            del self._ghosts[key]
        else:
            self._uses[key] = 1
            self._used_at[key] = self._now
        self._enter(key)

    def arrange(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):
            if key in self._queue_of:
                self._queues[self._queue_of[key]].move_to_end(key)

    def on_remove(self, key: bytes) -> None:
        self._leave_queue(key)
        self._ghosts[key] = None
        self._forget()

    def victims(self) -> Iterator[bytes]:
        return chain.from_iterable(self._queues)

    def _enter(self, key: bytes) -> None:
        queue = min(self._uses[key].bit_length() - 1, QUEUES - 1)
        self._queues[queue][key] = None
        self._queue_of[key] = queue
        self._sinks_at[key] = self._now + self._life

    def _leave_queue(self, key: bytes) -> None:
        del self._queues[self._queue_of.pop(key)][key]
        del self._sinks_at[key]

    def _sink(self) -> None:
        """Move expired keys at the heads of the queues down by one queue, and update `life` when it is due."""
        for queue in range(1, QUEUES):
            key = next(iter(self._queues[queue]), None)
            if key is not None and self._sinks_at[key] < self._now:
                del self._queues[queue][key]
                self._queues[queue - 1][key] = None
                self._queue_of[key] = queue - 1
                self._sinks_at[key] = self._now + self._life
        if self._now % max(self._capacity, LEAST_TURNOVER) == 0 and any(self._distances):
            self._life = 1 << self._distances.index(max(self._distances))
            self._distances = [count // 2 for count in self._distances]

    def _forget(self) -> None:
        while len(self._ghosts) > self.ghosts_per_chunk * self._capacity:
            key, _ = self._ghosts.popitem(last=False)
            del self._uses[key], self._used_at[key]

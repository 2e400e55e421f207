"""Which chunks are believed to be in Redis already, so that they are not written again."""

import threading
from collections import OrderedDict

from core.clock import Clock


class KnownKeys:
    """Hashes of chunks written or read lately: at most `limit`, each for `lifetime_ms`. Thread-safe.

    A belief, not the truth: Redis may have evicted any of them. What is believed in vain is found out at the next
    look-up, or forgotten after its lifetime; either way the chunk is written again.
    """

    def __init__(self, lifetime_ms: float, clock: Clock, limit: int) -> None:
        self._lifetime_ms = lifetime_ms
        self._clock = clock
        self._limit = limit
        self._lock = threading.Lock()
        self._until_ms: OrderedDict[bytes, float] = OrderedDict()

    def __contains__(self, chunk_hash: bytes) -> bool:
        with self._lock:
            until_ms = self._until_ms.get(chunk_hash)
            return until_ms is not None and self._clock.monotonic_ms() < until_ms

    def __len__(self) -> int:
        with self._lock:
            return len(self._until_ms)

    def add(self, chunk_hash: bytes) -> None:
        """Believe in it from now on; the belief that is oldest makes room."""
        with self._lock:
            self._until_ms[chunk_hash] = self._clock.monotonic_ms() + self._lifetime_ms
            self._until_ms.move_to_end(chunk_hash)
            if len(self._until_ms) > self._limit:
                self._until_ms.popitem(last=False)

    def discard(self, chunk_hash: bytes) -> None:
        with self._lock:
            self._until_ms.pop(chunk_hash, None)

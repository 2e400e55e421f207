"""FREQUENCY: room for the keys with the most accesses."""

from collections import Counter, deque
from collections.abc import Sequence

from cache.config import SizingConfig
from cache.sizing.protocol import clamp

_ROUNDING = 1e-9


class Frequency:
    """Hashes keys into buckets, and makes room for the most used buckets that together cover most accesses.

    It decides at every `adjust_every_requests`-th request. The buckets are sorted by accesses per distinct key,
    descending. The capacity is the number of distinct keys in the first buckets that cover `frequency_coverage` of all
    accesses. Only the last `frequency_window_accesses` accesses count, which bounds the memory.
    """

    def __init__(self, config: SizingConfig) -> None:
        self._config = config
        self._requests = 0
        self._window: deque[bytes] = deque()
        self._accesses_of_key: Counter[bytes] = Counter()
        self._accesses = [0] * config.frequency_buckets
        self._distinct = [0] * config.frequency_buckets
        self.capacity_chunks = clamp(config.capacity_chunks, config)

    def observe(self, now_ms: float, keys: Sequence[bytes]) -> int:
        for key in keys:
            self._count(key)
        self._requests += 1
        if self._requests % self._config.adjust_every_requests == 0 and self._window:
            self.capacity_chunks = clamp(self._keys_to_cover(), self._config)
        return self.capacity_chunks

    @property
    def remembered_accesses(self) -> int:
        """Number of accesses that the next decision counts; at most `frequency_window_accesses`."""
        return len(self._window)

    def _count(self, key: bytes) -> None:
        if len(self._window) == self._config.frequency_window_accesses:
            self._forget(self._window.popleft())
        self._window.append(key)
        bucket = self._bucket(key)
        self._accesses[bucket] += 1
        self._accesses_of_key[key] += 1
        if self._accesses_of_key[key] == 1:
            self._distinct[bucket] += 1

    def _forget(self, key: bytes) -> None:
        bucket = self._bucket(key)
        self._accesses[bucket] -= 1
        self._accesses_of_key[key] -= 1
        if self._accesses_of_key[key] == 0:
            del self._accesses_of_key[key]
            self._distinct[bucket] -= 1

    def _bucket(self, key: bytes) -> int:
        # The bytes of a key are uniform. Python's hash would differ from process to process.
        return int.from_bytes(key[:8], "little") % self._config.frequency_buckets

    def _keys_to_cover(self) -> int:
        to_cover = self._config.frequency_coverage * len(self._window) - _ROUNDING
        used = [bucket for bucket, distinct in enumerate(self._distinct) if distinct]
        used.sort(key=lambda bucket: self._accesses[bucket] / self._distinct[bucket], reverse=True)
        keys = covered = 0
        for bucket in used:
            if covered >= to_cover:
                break
            covered += self._accesses[bucket]
            keys += self._distinct[bucket]
        return keys

"""The local tier: real tensors in the operator's process, counted in chunks of one size."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cache.eviction import EvictionPolicy


@dataclass
class _Entry:
    chunk: torch.Tensor
    pins: int = 0


class LocalTier:
    """Chunks by key, at most `capacity_chunks` of them; the eviction policy says which leaves for another.

    Chunks are immutable once they are in. A pinned chunk never leaves. Room is taken by `reserve` before a chunk's
    memory is filled, so that what is in flight counts as well. After a shrink pinned chunks may stand above the
    capacity; they leave as they are unpinned. Not thread-safe: it belongs to the engine's thread.
    """

    def __init__(self, capacity_chunks: int, chunk_bytes: int, eviction: EvictionPolicy) -> None:
        self.capacity_chunks = capacity_chunks
        self.evictions = 0
        self._chunk_bytes = chunk_bytes
        self._eviction = eviction
        self._entries: dict[bytes, _Entry] = {}
        self._in_flight = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._entries)

    @property
    def used_chunks(self) -> int:
        """Chunks that are in, and those that room is reserved for."""
        return len(self._entries) + self._in_flight

    @property
    def pinned_chunks(self) -> int:
        return sum(1 for entry in self._entries.values() if entry.pins)

    @property
    def size_bytes(self) -> int:
        """Bytes of tensors that are in or in flight."""
        return self.used_chunks * self._chunk_bytes

    def pin(self, key: bytes) -> torch.Tensor | None:
        """The chunk, kept in place until as many `unpin` as `pin`; `None` if it is not here."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        entry.pins += 1
        return entry.chunk

    def unpin(self, key: bytes) -> None:
        """Undo one `pin`. A chunk that stood above the capacity may leave now."""
        entry = self._entries[key]
        if entry.pins == 0:
            raise RuntimeError("a chunk was unpinned more often than pinned")
        entry.pins -= 1
        self._evict_down_to(self.capacity_chunks)

    def touch(self, keys_first_to_last: Iterable[bytes]) -> None:
        """A prompt's chunks were used. Its first becomes the most recent: without it the others are of no use."""
        for key in reversed(list(keys_first_to_last)):
            self._eviction.on_access(key)

    def resize(self, capacity_chunks: int) -> None:
        """Set the capacity. Growing evicts nothing; shrinking evicts down to it, pinned chunks excepted."""
        self.capacity_chunks = capacity_chunks
        self._evict_down_to(capacity_chunks)

    @contextmanager
    def reserve(self) -> Iterator["Reservation | None"]:
        """Room for one chunk while its memory is filled; `None` if everything here is pinned or in flight.

        Room that is not used by `commit` before the block ends, in whatever way, is given back.
        """
        self._evict_down_to(self.capacity_chunks - 1)
        if self.used_chunks >= self.capacity_chunks:
            yield None
            return
        self._in_flight += 1
        reservation = Reservation(self)
        try:
            yield reservation
        finally:
            if not reservation.committed:
                self._in_flight -= 1

    def put(self, key: bytes, chunk: torch.Tensor) -> bool:
        """Keep a finished chunk; false if there is no room, or none may be made."""
        with self.reserve() as reservation:
            if reservation is None:
                return False
            reservation.commit(key, chunk)
            return True

    def _insert(self, key: bytes, chunk: torch.Tensor) -> None:
        if key in self._entries:
            raise RuntimeError("a chunk may not be overwritten")
        self._in_flight -= 1
        self._entries[key] = _Entry(chunk)
        self._eviction.on_insert(key)

    def _evict_down_to(self, chunks: int) -> None:
        while self._entries and self.used_chunks > max(chunks, 0):
            victim = next((key for key in self._eviction.victims() if not self._entries[key].pins), None)
            if victim is None:
                return
            self._eviction.on_remove(victim)
            del self._entries[victim]
            self.evictions += 1


class Reservation:
    """Room for one chunk in a `LocalTier`."""

    def __init__(self, tier: LocalTier) -> None:
        self._tier = tier
        self.committed = False

    def commit(self, key: bytes, chunk: torch.Tensor) -> None:
        """Make `chunk` visible under `key`, which must not be in the tier."""
        self._tier._insert(key, chunk)
        self.committed = True

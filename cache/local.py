"""The local tier: real tensors in the operator's process, counted in chunks of one size."""

from collections.abc import Iterator, Sequence
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
        eviction.on_resize(capacity_chunks)

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

    def request(self, keys: Sequence[bytes]) -> None:
        """A prompt asks for its chunks, first to last: one use of each, whether it is here or may come."""
        self._eviction.on_request(keys)

    def arrange(self, keys: Sequence[bytes]) -> None:
        """These chunks, which are here, are a prompt's, first to last: the last is to leave first."""
        self._eviction.arrange(keys)

    def resize(self, capacity_chunks: int) -> None:
        """Set the capacity. Growing evicts nothing; shrinking evicts down to it, pinned chunks excepted."""
        if capacity_chunks != self.capacity_chunks:
            self.capacity_chunks = capacity_chunks
            self._eviction.on_resize(capacity_chunks)
        self._evict_down_to(capacity_chunks)

    @contextmanager
    def reserve(self, key: bytes) -> Iterator["Reservation | None"]:
        """Room for the chunk `key`, which is not here, while its memory is filled.

        `None` if everything here is pinned or in flight, or is worth more by the eviction policy. Room that is not
        used by `commit` before the block ends, in whatever way, is given back.
        """
        if not self._make_room(key):
            yield None
            return
        self._in_flight += 1
        reservation = Reservation(self, key)
        try:
            yield reservation
        finally:
            if not reservation.committed:
                self._in_flight -= 1

    def put(self, key: bytes, chunk: torch.Tensor) -> bool:
        """Keep a finished chunk; false if there is no room for it, or none may be made."""
        with self.reserve(key) as reservation:
            if reservation is None:
                return False
            reservation.commit(chunk)
            return True

    def _make_room(self, key: bytes) -> bool:
        if self.used_chunks >= self.capacity_chunks:
            if not self._eviction.admits(key):
                return False
            self._evict_down_to(self.capacity_chunks - 1)
        return self.used_chunks < self.capacity_chunks

    def _insert(self, key: bytes, chunk: torch.Tensor) -> None:
        if key in self._entries:
            raise RuntimeError("a chunk may not be overwritten")
        self._eviction.on_insert(key)
        self._in_flight -= 1
        self._entries[key] = _Entry(chunk)

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

    def __init__(self, tier: LocalTier, key: bytes) -> None:
        self._tier = tier
        self._key = key
        self.committed = False

    def commit(self, chunk: torch.Tensor) -> None:
        """Make `chunk` visible, which must not be in the tier."""
        self._tier._insert(self._key, chunk)
        self.committed = True

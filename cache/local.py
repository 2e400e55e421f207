"""The local tier: tensors in the memory of the slot's process. All chunks have the same size."""

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
    """Chunks by key, at most `capacity_chunks` of them. The eviction policy chooses which chunk makes room for another.

    Stored chunks are immutable. A pinned chunk is never evicted. `reserve` takes room before the memory of a chunk is
    filled, so chunks in flight count too. After a shrink, pinned chunks may exceed the capacity. They are evicted when
    they are unpinned. Not thread-safe: the tier belongs to the engine's thread.
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
        """Number of stored chunks, and of those with reserved room."""
        return len(self._entries) + self._in_flight

    @property
    def pinned_chunks(self) -> int:
        return sum(1 for entry in self._entries.values() if entry.pins)

    @property
    def size_bytes(self) -> int:
        """Bytes of tensors that are stored or in flight."""
        return self.used_chunks * self._chunk_bytes

    def pin(self, key: bytes) -> torch.Tensor | None:
        """Return the chunk and keep it until `unpin` is called as often as `pin`. None if it is not stored."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        entry.pins += 1
        return entry.chunk

    def unpin(self, key: bytes) -> None:
        """Undo one `pin`. A chunk above the capacity may be evicted now."""
        entry = self._entries[key]
        if entry.pins == 0:
            raise RuntimeError("a chunk was unpinned more often than pinned")
        entry.pins -= 1
        self._evict_down_to(self.capacity_chunks)

    def request(self, keys: Sequence[bytes]) -> None:
        """A prompt asks for its chunks, first to last. This counts as one use of each, stored or not."""
        self._eviction.on_request(keys)

    def arrange(self, keys: Sequence[bytes]) -> None:
        """These stored chunks belong to one prompt, first to last. The last is to be evicted first."""
        self._eviction.arrange(keys)

    def resize(self, capacity_chunks: int) -> None:
        """Set the capacity. Shrinking evicts chunks down to it, except pinned ones."""
        if capacity_chunks != self.capacity_chunks:
            self.capacity_chunks = capacity_chunks
            self._eviction.on_resize(capacity_chunks)
        self._evict_down_to(capacity_chunks)

    @contextmanager
    def reserve(self, key: bytes) -> Iterator["Reservation | None"]:
        """Reserve room for the chunk `key`, which is not stored, while its memory is filled.

        `None` if all stored chunks are pinned or in flight, or the eviction policy values them more. Unless `commit` is
        called, the room is free again at the end of the block.
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
        """Store a finished chunk. False if there is no room for it."""
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
    """Reserved room for one chunk in a `LocalTier`."""

    def __init__(self, tier: LocalTier, key: bytes) -> None:
        self._tier = tier
        self._key = key
        self.committed = False

    def commit(self, chunk: torch.Tensor) -> None:
        """Store `chunk`, which must not be in the tier yet."""
        self._tier._insert(self._key, chunk)
        self.committed = True

"""Fetches chunks from Redis while their requests wait in the engine's queue.

One thread fetches one prompt after the other, in the order of the queue. The engine's thread takes the chunks that have
arrived. The bytes of chunks that have not been taken yet, and of those that are being read, are limited.
"""

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from cache.keys import PromptKeys
from cache.torch_threads import use_one_thread

logger = logging.getLogger(__name__)

_JOIN_S = 1.0
"""Maximum time for which `close` waits for the thread."""


class Reader(Protocol):
    """Reads chunks from Redis; `cache.remote.RemoteTier.fetch`."""

    def __call__(
        self,
        fingerprint: bytes,
        hashes: list[bytes],
        prefill_ms_per_token: float | None,
        land: Callable[[bytes, torch.Tensor], bool],
    ) -> None: ...


@dataclass(eq=False)
class QueuedFetch:
    """The `cache.protocol.Prefetch` of a `TwoLevelCache`."""

    keys: PromptKeys
    _prefill_ms_per_token: float | None
    _fetcher: "Fetcher"
    _due_s: float
    """Monotonic time after which requests no longer wait for this fetch."""
    _finished: threading.Event = field(default_factory=threading.Event)
    _taken: bool = False
    """True once it is taken or cancelled. Chunks that arrive later are dropped."""
    _landed: list[bytes] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """True once the fetch has ended, or the deadline has passed."""
        return self._finished.is_set() or time.monotonic() >= self._due_s

    def wait(self, timeout_s: float) -> None:
        """Return once it is `ready`, or after `timeout_s`."""
        self._finished.wait(max(0.0, min(timeout_s, self._due_s - time.monotonic())))

    def finish(self) -> None:
        """Wait until the fetch has ended, even after the deadline."""
        self._finished.wait()

    def take(self) -> dict[bytes, torch.Tensor]:
        """Take the chunks that have arrived, by key, and end the fetch. Empty the second time."""
        return self._fetcher.take(self)

    def cancel(self) -> None:
        """Drop the chunks that have arrived and those that still will. Idempotent."""
        self.take()


@dataclass
class _Landed:
    chunk: torch.Tensor
    holders: int = 1
    """Number of prefetches that will take it. Prompts with a common prefix share chunks."""


class Fetcher:
    """The queue of prefetches and the thread that carries them out."""

    def __init__(
        self,
        read: Reader,
        is_resident: Callable[[bytes], bool],
        *,
        chunk_bytes: int,
        limit_bytes: int,
        deadline_ms: float,
    ) -> None:
        """`is_resident` is true for chunks in the local tier. The fetcher's thread calls it.

        `limit_bytes`: maximum bytes of chunks that have arrived or are being read, for all prefetches together.
        """
        self._read = read
        self._is_resident = is_resident
        self._chunk_bytes = chunk_bytes
        self._limit_chunks = limit_bytes // chunk_bytes
        self._deadline_s = deadline_ms / 1000.0
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        # Below: guarded by `_changed`.
        self._queue: list[tuple[int, int, QueuedFetch]] = []
        self._landed: dict[bytes, _Landed] = {}
        self._reserved = 0
        """Chunks of the current fetch that have not arrived yet."""
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="cache-prefetch", daemon=True)
        self._thread.start()

    @property
    def held_bytes(self) -> int:
        """Bytes of chunks that have arrived or are being read. At most the limit."""
        with self._changed:
            return (len(self._landed) + self._reserved) * self._chunk_bytes

    def begin(self, keys: PromptKeys, prefill_ms_per_token: float | None, priority: int) -> QueuedFetch:
        """Queue a fetch. Fetches run in the order of falling `priority`, then of arrival."""
        prefetch = QueuedFetch(keys, prefill_ms_per_token, self, time.monotonic() + self._deadline_s)
        with self._changed:
            if self._closing:
                prefetch._finished.set()
            else:
                heapq.heappush(self._queue, (-priority, next(self._numbers), prefetch))
                self._changed.notify_all()
        return prefetch

    def take(self, prefetch: QueuedFetch) -> dict[bytes, torch.Tensor]:
        """See `QueuedFetch.take`."""
        with self._changed:
            prefetch._taken = True
            chunks = {key: self._let_go(key) for key in prefetch._landed}
            prefetch._landed.clear()
            self._changed.notify_all()
        return chunks

    def close(self) -> None:
        """End the thread. Chunks that have arrived stay until they are taken or cancelled. Idempotent."""
        with self._changed:
            self._closing = True
            waiting, self._queue = self._queue, []
            self._changed.notify_all()
        for _, _, prefetch in waiting:
            prefetch._finished.set()
        self._thread.join(_JOIN_S)

    def _let_go(self, key: bytes) -> torch.Tensor:
        landed = self._landed[key]
        landed.holders -= 1
        if not landed.holders:
            del self._landed[key]
        return landed.chunk

    def _run(self) -> None:
        use_one_thread()
        while (turn := self._next()) is not None:
            prefetch, missing = turn
            try:
                if missing:
                    self._fetch(prefetch, missing)
            except Exception:  # later prompts must still be fetched
                logger.exception("cannot fetch chunks from Redis")
            finally:
                with self._changed:
                    self._reserved = 0
                prefetch._finished.set()

    def _next(self) -> tuple[QueuedFetch, list[bytes]] | None:
        """Wait for a prefetch, and for room for its chunks. Return both it and the keys to fetch. `None`: closed."""
        with self._changed:
            while not self._closing:
                while self._queue and self._queue[0][2]._taken:
                    heapq.heappop(self._queue)[2]._finished.set()
                if self._queue:
                    prefetch = self._queue[0][2]
                    lacking = [key for key in prefetch.keys.hashes if not self._is_resident(key)]
                    missing = [key for key in lacking if key not in self._landed][: self._limit_chunks]
                    if len(self._landed) + len(missing) <= self._limit_chunks:
                        heapq.heappop(self._queue)
                        self._reserved = len(missing)
                        self._share(prefetch, lacking)
                        return prefetch, missing
                self._changed.wait()
        return None

    def _share(self, prefetch: QueuedFetch, lacking: list[bytes]) -> None:
        """Add the chunks that have already arrived for other prefetches."""
        for key in lacking:
            if key in self._landed:
                self._landed[key].holders += 1
                prefetch._landed.append(key)

    def _fetch(self, prefetch: QueuedFetch, missing: list[bytes]) -> None:
        def land(key: bytes, chunk: torch.Tensor) -> bool:
            with self._changed:
                self._reserved -= 1
                if not prefetch._taken and not self._closing:
                    self._landed[key] = _Landed(chunk)
                    prefetch._landed.append(key)
                return not prefetch._taken and not self._closing

        self._read(prefetch.keys.fingerprint, missing, prefetch._prefill_ms_per_token, land)

"""The two-level cache: the local tier first, then Redis for the rest of the prefix."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Self

import torch

from cache.config import CacheConfig
from cache.eviction import make_eviction
from cache.keys import KeySchema
from cache.local import LocalTier
from cache.prefetch import Fetcher, QueuedFetch
from cache.protocol import ChunkShape, ModelIdentity, Prefetch, Tier
from cache.redis_wire import RedisAddress
from cache.remote import ReadCounters, RemoteTier
from cache.seal import make_seal
from cache.sizing import Shares, SizingPolicy, StoreObserver, make_sizing
from cache.stats import CacheStats
from cache.write_behind import WriteCounters
from core.clock import Clock
from core.credentials import chunk_key

logger = logging.getLogger(__name__)


class PinnedPrefix:
    """The `cache.protocol.CachedPrefix` of a `TwoLevelCache`."""

    def __init__(
        self,
        chunks: Sequence[torch.Tensor],
        tiers: Sequence[Tier],
        capacity_chunks: int,
        used_chunks: int,
        on_release: Callable[[], None],
    ) -> None:
        self.chunks = chunks
        self.tiers = tiers
        self.local_chunks = tiers.count("local")
        self.remote_chunks = tiers.count("remote")
        self.capacity_chunks = capacity_chunks
        self.used_chunks = used_chunks
        self._on_release: Callable[[], None] | None = on_release

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Unpin the chunks. `chunks` is empty from now on. Idempotent."""
        if self._on_release is not None:
            self._on_release()
            self._on_release = None
            self.chunks = ()


def open_cache(
    config: CacheConfig, shape: ChunkShape, identity: ModelIdentity, clock: Clock, shares: Shares | None = None
) -> "TwoLevelCache":
    """Make an empty cache. Without `redis_url` it has a local tier only. Does not wait for Redis.

    `shares`: the share of a budget that several slots divide, for the strategy MRC.
    Raises `UserError` for an invalid `redis_url` and for secrets that this host cannot read, and `ValueError` if
    `shape` has another chunk size.
    """
    if shape.chunk_tokens != config.chunk_tokens:
        raise ValueError(f"a shape of {shape.chunk_tokens} tokens for chunks of {config.chunk_tokens}")
    sizing = make_sizing(config.sizing, shares)
    local = LocalTier(sizing.capacity_chunks, shape.size_bytes, make_eviction(config.eviction))
    remote, seal = None, make_seal(None)
    if config.remote.redis_url is not None:
        seal = make_seal(chunk_key(config.remote.chunk_key_file))
        address = RedisAddress.of(config.remote.redis_url, config.remote.access)
        remote = RemoteTier(config.remote, address, shape, seal, clock)
    keys = KeySchema(identity, shape, config.remote.remote_codec, seal.key_name)
    return TwoLevelCache(shape=shape, keys=keys, local=local, sizing=sizing, remote=remote, clock=clock)


class TwoLevelCache:
    """A `cache.protocol.KVCache` for one engine thread."""

    def __init__(
        self,
        *,
        shape: ChunkShape,
        keys: KeySchema,
        local: LocalTier,
        sizing: SizingPolicy,
        remote: RemoteTier | None,
        clock: Clock,
    ) -> None:
        self.shape = shape
        self._keys = keys
        self._local = local
        self._sizing = sizing
        self._store_observer = sizing if isinstance(sizing, StoreObserver) else None
        self._remote = remote
        self._fetcher: Fetcher | None = None
        if remote is not None:
            self._fetcher = Fetcher(
                remote.fetch,
                local.__contains__,
                chunk_bytes=shape.size_bytes,
                limit_bytes=remote.prefetch_bytes,
                deadline_ms=remote.deadline_ms,
            )
        self._clock = clock
        self._lookups = 0
        self._chunks_looked_up = 0
        self._local_chunks_hit = 0
        self._remote_chunks_hit = 0
        self._chunks_stored = 0
        self._chunks_refused = 0
        self._pinned_outside = 0

    def prefetch(
        self, token_ids: Sequence[int], salt: str = "", prefill_ms_per_token: float | None = None, priority: int = 0
    ) -> QueuedFetch | None:
        """See `cache.protocol.KVCache`."""
        if self._fetcher is None or self._remote is None or self._remote.is_away:
            return None
        try:
            keys = self._keys.of(token_ids, salt)
        except Exception:
            logger.exception("cannot compute the keys of a prompt; nothing is fetched for it")
            return None
        if all(key in self._local for key in keys.hashes):
            return None
        return self._fetcher.begin(keys, prefill_ms_per_token, priority)

    def lookup(self, token_ids: Sequence[int], salt: str = "", prefetch: Prefetch | None = None) -> PinnedPrefix:
        """See `cache.protocol.KVCache`. Chunks from Redis are stored in the local tier if there is room."""
        self._lookups += 1
        pinned: list[bytes] = []
        try:
            if isinstance(prefetch, QueuedFetch):
                keys, fetched = prefetch.keys, prefetch.take()
            else:
                keys, fetched = self._keys.of(token_ids, salt), {}
            self._local.resize(self._sizing.observe(self._clock.monotonic_ms(), keys.hashes))
            used_chunks = self._local.used_chunks
            self._chunks_looked_up += len(keys.hashes)
            found = self._pin_prefix(keys.hashes, fetched, pinned)
        except Exception:
            # For example an error in a policy. The engine then computes the prompt.
            logger.exception("a lookup failed; nothing is reused")
            self._unpin_all(pinned)
            return PinnedPrefix([], [], self._local.capacity_chunks, self._local.used_chunks, lambda: None)
        outside = len(found) - len(pinned)
        prefix = PinnedPrefix(
            chunks=[chunk for chunk, _ in found],
            tiers=[tier for _, tier in found],
            capacity_chunks=self._local.capacity_chunks,
            used_chunks=used_chunks,
            on_release=partial(self._release, pinned, outside),
        )
        self._pinned_outside += outside
        self._local_chunks_hit += prefix.local_chunks
        self._remote_chunks_hit += prefix.remote_chunks
        return prefix

    def fetch_and_lookup(
        self, token_ids: Sequence[int], salt: str = "", prefill_ms_per_token: float | None = None
    ) -> PinnedPrefix:
        """`prefetch`, wait for Redis, then `lookup`: for callers that can wait."""
        prefetch = self.prefetch(token_ids, salt, prefill_ms_per_token)
        if prefetch is not None:
            prefetch.finish()
        return self.lookup(token_ids, salt, prefetch)

    def store(self, token_ids: Sequence[int], read_chunk: Callable[[int, torch.Tensor], None], salt: str = "") -> int:
        """See `cache.protocol.KVCache`. Chunks without room in the local tier go to Redis only.

        A chunk that is in the local tier, but not known to be in Redis, is queued without being copied again.
        """
        keys = self._keys.of(token_ids, salt)
        stored = 0
        pinned: list[bytes] = []
        try:
            for index, key in enumerate(keys.hashes):
                if key not in self._local:
                    stored += self._keep(keys.fingerprint, index, key, read_chunk)
                chunk = self._local.pin(key)
                # Pinned chunks are not evicted, so a prompt does not lose its beginning to make room for its end.
                if chunk is not None:
                    pinned.append(key)
                    self._write_behind(keys.fingerprint, key, chunk)
        finally:
            self._chunks_stored += stored
            try:
                self._local.arrange(pinned)
            finally:
                self._unpin_all(pinned)
        if self._store_observer is not None:
            self._store_observer.observe_stored(keys.hashes)
        return stored

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Write the queued chunks to Redis. True if that was done in time."""
        return self._remote is None or self._remote.writes.flush(timeout_s)

    def close(self, timeout_s: float = 5.0) -> None:
        """See `cache.protocol.KVCache`. Idempotent."""
        if self._fetcher is not None:
            self._fetcher.close()
        if self._remote is not None:
            self._remote.close(timeout_s)

    def stats(self) -> CacheStats:
        """A snapshot; the counts of the background threads may be slightly older or newer."""
        reads = ReadCounters() if self._remote is None else self._remote.counters
        writes = WriteCounters() if self._remote is None else self._remote.writes.counters
        return CacheStats(
            lookups=self._lookups,
            chunks_looked_up=self._chunks_looked_up,
            local_chunks_hit=self._local_chunks_hit,
            remote_chunks_hit=self._remote_chunks_hit,
            chunks_stored=self._chunks_stored,
            chunks_refused=self._chunks_refused,
            evictions=self._local.evictions,
            remote_errors=reads.errors + writes.errors,
            remote_timeouts=reads.timeouts,
            remote_corrupt=reads.corrupt,
            write_dropped=writes.chunks_dropped,
            write_unfit=writes.chunks_unfit,
            bytes_read=reads.bytes_read,
            bytes_written=writes.bytes_written,
            capacity_chunks=self._local.capacity_chunks,
            used_chunks=self._local.used_chunks,
            pinned_chunks=self._local.pinned_chunks,
            local_bytes=self._local.size_bytes,
            pinned_outside_bytes=self._pinned_outside * self.shape.size_bytes,
            fetched_bytes=0 if self._fetcher is None else self._fetcher.held_bytes,
            queued_bytes=0 if self._remote is None else self._remote.writes.queued_bytes,
        )

    def _pin_prefix(
        self, hashes: Sequence[bytes], fetched: Mapping[bytes, torch.Tensor], pinned: list[bytes]
    ) -> list[tuple[torch.Tensor, Tier]]:
        """The chunks of the longest prefix. Pins those in the local tier, and adds their keys to `pinned`."""
        self._local.request(hashes)
        # Pin first: storing fetched chunks may evict others.
        resident: dict[bytes, torch.Tensor] = {}
        for key in hashes:
            if (chunk := self._local.pin(key)) is not None:
                resident[key] = chunk
                pinned.append(key)
        prefix = _prefix(hashes, resident, fetched)
        reused = sum(tier == "local" for _, tier in prefix)
        while len(pinned) > reused:
            self._local.unpin(pinned.pop())
        if reused < len(prefix):
            for key, (chunk, tier) in zip(hashes, prefix, strict=False):
                # Pin at once, so that a later chunk of the prompt does not evict it.
                if tier == "remote" and self._local.put(key, chunk):
                    self._local.pin(key)
                    pinned.append(key)
            held = set(pinned)
            pinned[:] = [key for key in hashes if key in held]
        self._local.arrange(pinned)
        return prefix

    def _keep(
        self, fingerprint: bytes, index: int, key: bytes, read_chunk: Callable[[int, torch.Tensor], None]
    ) -> bool:
        """Copy one chunk to the local tier or, without room there, to the queue for Redis. True if it was kept."""
        with self._local.reserve(key) as reservation:
            if reservation is not None:
                reservation.commit(self._filled(index, read_chunk))
                return True
        self._chunks_refused += 1
        if self._remote is None or not self._remote.writes.wants(key) or not self._remote.writes.has_room():
            return False
        return self._remote.writes.offer(key, fingerprint, self._filled(index, read_chunk))

    def _filled(self, index: int, read_chunk: Callable[[int, torch.Tensor], None]) -> torch.Tensor:
        chunk = torch.empty(self.shape.size, dtype=self.shape.dtype)
        read_chunk(index, chunk)
        return chunk

    def _write_behind(self, fingerprint: bytes, key: bytes, chunk: torch.Tensor) -> None:
        if self._remote is not None and self._remote.writes.wants(key):
            self._remote.writes.offer(key, fingerprint, chunk)

    def _release(self, pinned: Sequence[bytes], outside: int) -> None:
        self._pinned_outside -= outside
        self._unpin_all(pinned)

    def _unpin_all(self, keys: Sequence[bytes]) -> None:
        """Unpin all keys, even if one of them fails. Never raises."""
        # Last first: if the tier has shrunk meanwhile, the last chunks of a prompt are evicted first.
        for key in reversed(keys):
            try:
                self._local.unpin(key)
            except Exception:
                logger.exception("cannot evict a chunk that is not needed any more")


def _prefix(
    hashes: Sequence[bytes], resident: Mapping[bytes, torch.Tensor], fetched: Mapping[bytes, torch.Tensor]
) -> list[tuple[torch.Tensor, Tier]]:
    """The chunks from the first on, with their tiers, up to the first one that is in neither."""
    prefix: list[tuple[torch.Tensor, Tier]] = []
    for key in hashes:
        if key in resident:
            prefix.append((resident[key], "local"))
        elif key in fetched:
            prefix.append((fetched[key], "remote"))
        else:
            break
    return prefix

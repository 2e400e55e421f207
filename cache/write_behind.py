"""Writes chunks to Redis in a background thread. The engine's thread only queues references to them."""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cache.breaker import CircuitBreaker
from cache.codec import encode_header, record_bytes
from cache.config import RemoteConfig
from cache.payload import UnfitChunkError, make_payload
from cache.protocol import ChunkShape
from cache.redis_wire import ClusterModeError, Deadline, RedisConnection, ReplyError, WireError, encode_command
from cache.seal import Seal
from cache.torch_threads import use_one_thread
from core.clock import Clock

logger = logging.getLogger(__name__)

BATCH_BYTES = 4 << 20
"""Maximum bytes per flush, which has at least one chunk. A flush starts as soon as this much is queued."""
BATCH_TIMEOUT_MS = 5000.0
"""Time-out of one flush, including the connection. No lookup waits for it."""
_DELETE_BYTES = 256
"""Assumed size of a queued deletion, so that their number is limited too."""


@dataclass(frozen=True, slots=True)
class _Entry:
    chunk_hash: bytes
    fingerprint: bytes
    chunk: torch.Tensor | None
    """The chunk to write, or `None` to delete the key."""
    size_bytes: int


@dataclass
class WriteCounters:
    """Counters since the cache was opened."""

    chunks_written: int = 0
    bytes_written: int = 0
    chunks_dropped: int = 0
    chunks_unfit: int = 0
    """Those of `chunks_dropped` that the codec could not encode."""
    errors: int = 0


class KnownKeys:
    """Hashes of chunks that are assumed to be in Redis, so that they are not written again. Thread-safe.

    At most `limit` hashes, each for `lifetime_ms` after it was read or written. Redis may have evicted any of them. The
    next lookup shows this, or the lifetime ends; in both cases the chunk is written again.
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
        """Add a hash. If there are too many, the oldest is dropped."""
        with self._lock:
            self._until_ms[chunk_hash] = self._clock.monotonic_ms() + self._lifetime_ms
            self._until_ms.move_to_end(chunk_hash)
            if len(self._until_ms) > self._limit:
                self._until_ms.popitem(last=False)

    def discard(self, chunk_hash: bytes) -> None:
        with self._lock:
            self._until_ms.pop(chunk_hash, None)


class WriteBehind:
    """A queue with a limit in bytes, and the thread that empties it.

    A full queue drops new chunks. If Redis fails, the chunks of the current flush are dropped.
    """

    def __init__(
        self,
        config: RemoteConfig,
        shape: ChunkShape,
        open_connection: Callable[[Deadline], RedisConnection],
        known: KnownKeys,
        breaker: CircuitBreaker,
        *,
        seal: Seal,
        on_cluster: Callable[[ClusterModeError], None],
    ) -> None:
        """`on_cluster` is called if Redis turns out to run in cluster mode."""
        self.counters = WriteCounters()
        self._shape = shape
        self._codec = config.remote_codec
        self._seal = seal
        self._payload = make_payload(config.remote_codec, shape)
        self._prefix = config.redis_namespace.encode("ascii") + b":"
        self._set_options = b"\r\n" + _bulk(b"PX") + _bulk(b"%d" % (config.remote_ttl_s * 1000))
        self._limit_bytes = config.write_queue_bytes
        self._flush_s = config.write_flush_ms / 1000.0
        self._open_connection = open_connection
        self._on_cluster = on_cluster
        self._known = known
        self._breaker = breaker
        self._connection: RedisConnection | None = None
        self._changed = threading.Condition()
        # Below: guarded by `_changed`.
        self._queue: deque[_Entry] = deque()
        self._pending: set[bytes] = set()
        self._queued_bytes = 0
        self._oldest_at_s = 0.0
        self._flushers = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="cache-write-behind", daemon=True)
        self._thread.start()

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait or are being written, at most `write_queue_bytes`."""
        return self._queued_bytes

    def wants(self, chunk_hash: bytes) -> bool:
        """True if this chunk is worth an `offer`: it is neither known to be in Redis nor queued."""
        return chunk_hash not in self._pending and chunk_hash not in self._known

    def offer(self, chunk_hash: bytes, fingerprint: bytes, chunk: torch.Tensor) -> bool:
        """Queue a reference to `chunk`, which must not change any more. Returns false if it is dropped."""
        entry = _Entry(chunk_hash, fingerprint, chunk, self._shape.size_bytes)
        # While Redis is known to be unavailable, queued chunks would only take memory.
        accepted = not self._breaker.is_open and self._enqueue(entry)
        if not accepted:
            self.counters.chunks_dropped += 1
        return accepted

    def has_room(self) -> bool:
        """True if an `offer` would be accepted now."""
        return self._queued_bytes + self._shape.size_bytes <= self._limit_bytes and not self._breaker.is_open

    def delete(self, chunk_hash: bytes) -> None:
        """Queue the deletion of a key, before chunks that are offered later. Dropped if the queue is full."""
        self._known.discard(chunk_hash)
        self._enqueue(_Entry(chunk_hash, b"", None, _DELETE_BYTES))

    def flush(self, timeout_s: float) -> bool:
        """Write the queued chunks without waiting for more. True if the queue ran empty in time."""
        with self._changed:
            self._flushers += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(lambda: self._queued_bytes == 0, timeout_s)
            finally:
                self._flushers -= 1

    def close(self, timeout_s: float) -> None:
        """Flush as far as the time allows, drop the rest, and end the thread. Idempotent."""
        self.flush(timeout_s)
        with self._changed:
            self._closing = True
            dropped = sum(1 for entry in self._queue if entry.chunk is not None)
            self.counters.chunks_dropped += dropped
            self._queued_bytes -= sum(entry.size_bytes for entry in self._queue)
            self._queue.clear()
            self._pending.clear()
            self._changed.notify_all()
            connection = self._connection
        if connection is not None:
            connection.close()  # A write that hangs ends with an error.
        self._thread.join(1.0)

    def _enqueue(self, entry: _Entry) -> bool:
        with self._changed:
            if self._closing or self._queued_bytes + entry.size_bytes > self._limit_bytes:
                return False
            if not self._queue:
                self._oldest_at_s = time.monotonic()
            self._queue.append(entry)
            if entry.chunk is not None:
                self._pending.add(entry.chunk_hash)
            before, self._queued_bytes = self._queued_bytes, self._queued_bytes + entry.size_bytes
            # The thread is woken for the first chunk and for a full batch, not for each chunk.
            if len(self._queue) == 1 or before < BATCH_BYTES <= self._queued_bytes:
                self._changed.notify_all()
            return True

    def _run(self) -> None:
        use_one_thread()
        while batch := self._next_batch():
            try:
                self._write(batch)
            except Exception:  # later chunks must still be written
                logger.exception("cannot write chunks to Redis")
                self._hang_up()
                self.counters.errors += 1
                self.counters.chunks_dropped += sum(1 for entry in batch if entry.chunk is not None)
            finally:
                with self._changed:
                    self._pending.difference_update(entry.chunk_hash for entry in batch)
                    self._queued_bytes -= sum(entry.size_bytes for entry in batch)
                    self._changed.notify_all()
        self._hang_up()

    def _next_batch(self) -> list[_Entry]:
        """Wait for a full batch, or until the oldest chunk has waited long enough. Empty: closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            due_s = self._oldest_at_s + self._flush_s
            self._changed.wait_for(
                lambda: self._queued_bytes >= BATCH_BYTES or self._flushers or self._closing,
                max(due_s - time.monotonic(), 0.0),
            )
            batch: list[_Entry] = []
            size_bytes = 0
            while self._queue and (not batch or size_bytes + self._queue[0].size_bytes <= BATCH_BYTES):
                batch.append(self._queue.popleft())
                size_bytes += batch[-1].size_bytes
            self._oldest_at_s = time.monotonic()
            return batch

    def _write(self, batch: list[_Entry]) -> None:
        chunks = [entry for entry in batch if entry.chunk is not None]
        if not self._breaker.try_acquire():
            self.counters.chunks_dropped += len(chunks)
            return
        try:
            written = self._send(batch)
        except (OSError, WireError, ReplyError) as error:
            self._hang_up()
            self.counters.errors += 1
            self.counters.chunks_dropped += len(chunks)
            if isinstance(error, ClusterModeError):
                self._on_cluster(error)
            if self._breaker.failure() and not isinstance(error, ClusterModeError):
                logger.warning("Redis accepts no chunks; writes are suspended for now: %s", error)
            return
        except BaseException:
            # The breaker must be told of unexpected errors too. The caller counts them.
            self._breaker.failure()
            raise
        self._breaker.success()
        self.counters.chunks_dropped += len(chunks) - written
        self.counters.chunks_written += written
        self.counters.bytes_written += written * record_bytes(self._shape, self._codec)

    def _send(self, batch: list[_Entry]) -> int:
        """Send the batch, then read all replies. Return how many chunks Redis accepted.

        The refusal of some chunks (out of memory) is not a failure. A chunk that the codec cannot encode is counted and
        not sent.
        """
        deadline = Deadline(BATCH_TIMEOUT_MS)
        connection = self._connected(deadline)
        sent = []
        pieces: list[bytes | memoryview] = []
        for entry in batch:
            key = self._prefix + entry.chunk_hash.hex().encode("ascii")
            if entry.chunk is None:
                pieces.append(encode_command([b"UNLINK", key]))
                sent.append(entry)
                continue
            try:
                payload = self._payload.pack(entry.chunk)
            except UnfitChunkError:
                self.counters.chunks_unfit += 1
                continue
            header = encode_header(
                self._shape, entry.fingerprint, entry.chunk_hash, payload, self._codec, seal=self._seal
            )
            value_length = b"$%d\r\n" % (len(header) + len(payload))
            before = b"*5\r\n" + _bulk(b"SET") + _bulk(key) + value_length + header
            pieces += (before, payload, self._set_options)
            sent.append(entry)
        connection.send(pieces, deadline)
        written = 0
        refusal: ReplyError | None = None
        for entry in sent:
            try:
                connection.read_reply(deadline)
            except ClusterModeError:
                raise
            except ReplyError as error:
                refusal = error
                continue
            if entry.chunk is not None:
                self._known.add(entry.chunk_hash)
                written += 1
        if refusal is not None:
            self.counters.errors += 1
            if not written:
                raise refusal
        return written

    def _connected(self, deadline: Deadline) -> RedisConnection:
        if self._connection is None:
            connection = self._open_connection(deadline)
            with self._changed:
                if self._closing:
                    connection.close()
                self._connection = connection
        return self._connection

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _bulk(value: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(value), value)

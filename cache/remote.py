"""The remote tier: chunks as records in Redis, read with a deadline, and written in the background."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cache.breaker import CircuitBreaker
from cache.codec import HEADER_BYTES, check_header, check_payload, record_bytes
from cache.config import RemoteConfig
from cache.dialer import Dialer
from cache.fetch_plan import FetchPlan
from cache.payload import RecordError, make_payload, payload_view
from cache.protocol import ChunkShape
from cache.redis_wire import (
    ClusterModeError,
    Deadline,
    RedisAddress,
    RedisConnection,
    ReplyError,
    WireError,
    encode_command,
)
from cache.seal import Seal
from cache.write_behind import KnownKeys, WriteBehind
from core.clock import Clock

logger = logging.getLogger(__name__)


class _EndOfPrefixError(Exception):
    """A chunk has vanished from Redis since its length was read."""


class _Arrivals:
    """The chunks of one fetch that have arrived."""

    def __init__(self, land: Callable[[bytes, torch.Tensor], bool]) -> None:
        self._land = land
        self.chunks = 0
        self.more_wanted = True

    def add(self, chunk_hash: bytes, chunk: torch.Tensor) -> None:
        self.more_wanted = self._land(chunk_hash, chunk)
        self.chunks += 1


@dataclass
class ReadCounters:
    """Counters since the tier was opened."""

    errors: int = 0
    timeouts: int = 0
    corrupt: int = 0
    bytes_read: int = 0


class RemoteTier:
    """Reads chunks for the prefetch thread, and writes them by a `WriteBehind`.

    Redis may be unavailable or slow, and its values may be arbitrary. A fetch first asks for the lengths of all values.
    So it knows the length of the prefix before it decides what to fetch, and never receives useless values. After any
    error the connection is closed.
    """

    def __init__(
        self, config: RemoteConfig, address: RedisAddress, shape: ChunkShape, seal: Seal, clock: Clock
    ) -> None:
        self.counters = ReadCounters()
        self._address = address
        self._shape = shape
        self._codec = config.remote_codec
        self._seal = seal
        self._payload = make_payload(config.remote_codec, shape)
        self._record_bytes = record_bytes(shape, config.remote_codec)
        self._prefix = config.redis_namespace.encode("ascii") + b":"
        self.deadline_ms = config.remote_deadline_ms
        self.prefetch_bytes = config.prefetch_bytes
        self._chunks_per_trip = max(1, config.remote_read_bytes // self._record_bytes)
        self._plan = FetchPlan(shape.chunk_tokens, self._record_bytes, config.remote_deadline_ms)
        # One breaker each: slow writes that succeed must not close the breaker of reads that miss their deadline.
        self._breaker = CircuitBreaker(config.breaker_failures, config.breaker_open_ms, clock)
        self._dialer = Dialer(address)
        self._connection: RedisConnection | None = None
        self._header = bytearray(HEADER_BYTES)
        # Half the time to live, so that chunks that are still in use are written again before they expire.
        self._known = KnownKeys(config.remote_ttl_s * 1000 / 2, clock, config.remote_known_chunks)
        self._write_breaker = CircuitBreaker(config.breaker_failures, config.breaker_open_ms, clock)
        self._told_of_cluster = threading.Lock()
        self.writes = WriteBehind(
            config,
            shape,
            lambda deadline: RedisConnection.open(address, deadline),
            self._known,
            self._write_breaker,
            seal=seal,
            on_cluster=self._leave_for_good,
        )

    @property
    def is_away(self) -> bool:
        """True while reads are suspended after repeated failures."""
        return self._breaker.is_open

    def fetch(
        self,
        fingerprint: bytes,
        hashes: Sequence[bytes],
        prefill_ms_per_token: float | None,
        land: Callable[[bytes, torch.Tensor], bool],
    ) -> None:
        """Fetch a prefix of `hashes`: chunks that Redis has, that are worth fetching, and that arrive in time.

        `land` gets each chunk when it arrives, in memory of its own, and returns false if no more chunks are wanted.
        Never raises: an error is counted, and shortens the prefix. For one thread only.
        """
        if not hashes or not self._plan.begin(len(hashes), prefill_ms_per_token) or not self._breaker.try_acquire():
            return
        deadline = Deadline(self.deadline_ms)
        landed = _Arrivals(land)
        try:
            if self._connection is None:
                self._connection = self._dialer.connect(deadline)
            present = self._probe(self._connection, hashes, deadline)
            wanted = hashes[: self._plan.chunks_to_fetch(present, prefill_ms_per_token)]
            for start in range(0, len(wanted), self._chunks_per_trip):
                if not landed.more_wanted:
                    break
                self._read(
                    self._connection, fingerprint, wanted[start : start + self._chunks_per_trip], landed, deadline
                )
        except TimeoutError as error:
            self.counters.timeouts += 1
            self._failed(error)
        except (OSError, WireError, ReplyError) as error:
            self.counters.errors += 1
            self._failed(error)
        except RecordError as error:
            logger.warning("Redis at %s: a record was damaged or foreign and is deleted: %s", self._address, error)
            self._refuse(hashes[landed.chunks])
            self._hang_up()
            self._breaker.success()
        except _EndOfPrefixError:
            self._known.discard(hashes[landed.chunks])
            self._hang_up()  # Further replies are still on their way.
            self._breaker.success()
        except Exception as error:  # the breaker must be told of unexpected errors too
            logger.exception("cannot fetch chunks from Redis at %s", self._address)
            self.counters.errors += 1
            self._failed(error)
        else:
            self._breaker.success()
        for chunk_hash in hashes[: landed.chunks]:
            self._known.add(chunk_hash)
        self.counters.bytes_read += landed.chunks * self._record_bytes

    def close(self, timeout_s: float) -> None:
        """Write the queued chunks as far as the time allows, and end all threads and connections."""
        self.writes.close(timeout_s)
        self._dialer.close()
        self._hang_up()

    def _probe(self, connection: RedisConnection, hashes: Sequence[bytes], deadline: Deadline) -> int:
        """The number of leading `hashes` for which Redis has a value of the right length."""
        started_s = time.monotonic()
        connection.send([b"".join(encode_command([b"STRLEN", self._key(h)]) for h in hashes)], deadline)
        present = 0
        for position, chunk_hash in enumerate(hashes):
            try:
                length = connection.read_reply(deadline)
            except ReplyError as error:
                if not str(error).startswith("WRONGTYPE"):
                    raise
                length = -1
            if position == 0:
                self._plan.observe_round_trip((time.monotonic() - started_s) * 1000.0)
            if length == self._record_bytes:
                present += position == present
            else:
                self._known.discard(chunk_hash)
                if length != 0:
                    self._refuse(chunk_hash)
        return present

    def _read(
        self,
        connection: RedisConnection,
        fingerprint: bytes,
        hashes: Sequence[bytes],
        landed: _Arrivals,
        deadline: Deadline,
    ) -> None:
        """Read chunks in one round trip. Each is passed on when it arrives, and stays valid if a later one fails."""
        started_s = time.monotonic()
        before = landed.chunks
        try:
            connection.send([b"".join(encode_command([b"GET", self._key(h)]) for h in hashes)], deadline)
            for chunk_hash in hashes:
                landed.add(chunk_hash, self._read_chunk(connection, fingerprint, chunk_hash, deadline))
        finally:
            if came := landed.chunks - before:
                self._plan.observe_transfer(came * self._record_bytes, (time.monotonic() - started_s) * 1000.0)

    def _read_chunk(
        self, connection: RedisConnection, fingerprint: bytes, chunk_hash: bytes, deadline: Deadline
    ) -> torch.Tensor:
        length = connection.read_bulk_length(deadline)
        if length is None:
            raise _EndOfPrefixError
        if length != self._record_bytes:
            raise RecordError(f"record of {length} bytes instead of {self._record_bytes}")
        connection.read_into(memoryview(self._header), deadline)
        check_header(self._header, self._shape, fingerprint, chunk_hash, self._codec)
        memory = self._payload.memory()
        payload = payload_view(memory)
        connection.read_into(payload, deadline)
        connection.end_bulk(deadline)
        check_payload(self._header, payload, self._seal)
        return self._payload.unpack(memory)

    def _key(self, chunk_hash: bytes) -> bytes:
        return self._prefix + chunk_hash.hex().encode("ascii")

    def _refuse(self, chunk_hash: bytes) -> None:
        self.counters.corrupt += 1
        self.writes.delete(chunk_hash)

    def _leave_for_good(self, error: ClusterModeError) -> None:
        """Stop reading and writing for good. Both threads may call this; it logs once."""
        self._breaker.retire()
        self._write_breaker.retire()
        if self._told_of_cluster.acquire(blocking=False):
            logger.error(
                "Redis at %s runs in cluster mode, which is not supported, and is not used; name one without it in "
                "redis_url (%s)",
                self._address,
                error,
            )

    def _failed(self, error: Exception) -> None:
        self._hang_up()
        if isinstance(error, ClusterModeError):
            self._leave_for_good(error)
            self._breaker.failure()
        elif self._breaker.failure():
            logger.warning("Redis at %s: reads are suspended for now: %s", self._address, error)

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

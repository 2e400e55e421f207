"""The remote tier: chunks as records in Redis, read under one deadline, written behind."""

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
    """A chunk that Redis had a moment ago is gone."""


class _Landed:
    """What has come of one fetch."""

    def __init__(self, land: Callable[[bytes, torch.Tensor], bool]) -> None:
        self._land = land
        self.chunks = 0
        self.more_wanted = True

    def add(self, chunk_hash: bytes, chunk: torch.Tensor) -> None:
        self.more_wanted = self._land(chunk_hash, chunk)
        self.chunks += 1


@dataclass
class ReadCounters:
    """What happened so far."""

    errors: int = 0
    timeouts: int = 0
    corrupt: int = 0
    bytes_read: int = 0


class RemoteTier:
    """Reads for the prefetch thread, and a `WriteBehind`. Redis may be away, slow, or hold anything at all.

    A look-up asks for the lengths of all values first: it then knows how long the prefix is before it decides whether
    to fetch it, and never receives a value that is of no use. After any fault the connection is thrown away.
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
        # Reads and writes fail apart: writes that succeed slowly must not vouch for reads that miss their deadline.
        self._breaker = CircuitBreaker(config.breaker_failures, config.breaker_open_ms, clock)
        self._dialer = Dialer(address)
        self._connection: RedisConnection | None = None
        self._header = bytearray(HEADER_BYTES)
        # Believed for half the time to live, so that what is still in use is written afresh before it expires.
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
        """Whether Redis has failed too often of late to be asked now."""
        return self._breaker.is_open

    def fetch(
        self,
        fingerprint: bytes,
        hashes: Sequence[bytes],
        prefill_ms_per_token: float | None,
        land: Callable[[bytes, torch.Tensor], bool],
    ) -> None:
        """Fetch the longest prefix of `hashes` that Redis has, is worth fetching and comes within the deadline.

        `land` is given each chunk as it comes, fresh memory of the chunk's size, and returns whether more is wanted.
        Every fault is a shorter prefix, and counted. Never raises. For one thread.
        """
        if not hashes or not self._plan.begin(len(hashes), prefill_ms_per_token) or not self._breaker.try_acquire():
            return
        deadline = Deadline(self.deadline_ms)
        landed = _Landed(land)
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
            self._hang_up()  # The rest of the replies is still on its way.
            self._breaker.success()
        except Exception as error:  # what nobody thought of must not keep the breaker from being told
            logger.exception("chunks could not be fetched from Redis at %s", self._address)
            self.counters.errors += 1
            self._failed(error)
        else:
            self._breaker.success()
        for chunk_hash in hashes[: landed.chunks]:
            self._known.add(chunk_hash)
        self.counters.bytes_read += landed.chunks * self._record_bytes

    def close(self, timeout_s: float) -> None:
        """Write out what is queued, as far as the time allows, and end all threads and connections."""
        self.writes.close(timeout_s)
        self._dialer.close()
        self._hang_up()

    def _probe(self, connection: RedisConnection, hashes: Sequence[bytes], deadline: Deadline) -> int:
        """How many of `hashes`, from the first on, Redis has a value of the right length for."""
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
        landed: _Landed,
        deadline: Deadline,
    ) -> None:
        """One round trip: chunks land one by one, so that those that came stay if a later one fails."""
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
        """Neither read nor write any more. Called by both threads; told once."""
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
            logger.warning("Redis at %s is left alone for now: %s", self._address, error)

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

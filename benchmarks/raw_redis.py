"""A Redis for measurements, and the fastest plain way to read bytes from it: the lower bound for a cache over it."""

import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from redis import Redis

from cache.redis_wire import encode_command
from core.clients import redis_settings
from core.errors import UserError
from local_stack.config import StackConfig
from local_stack.processes import Started, end
from local_stack.redis import RedisService
from local_stack.service import require_own, wait_ready

MEMORY_MB = 2048
START_TIMEOUT_S = 30.0
STOP_GRACE_S = 5.0
READ_TIMEOUT_S = 30


@contextmanager
def running_redis(url: str | None, directory: Path) -> Iterator[str]:
    """Give the address of the Redis at `url`, or without `url` start one below `directory` and stop it at the end."""
    if url is not None:
        require_own(RedisService(StackConfig(dir=directory, redis_url=url)))
        yield url
        return
    service = RedisService(StackConfig.on_free_ports(directory, redis_max_memory_mb=MEMORY_MB))
    started: list[Started] = []
    try:
        started += [service.launch(name) for name in service.processes]
        wait_ready(service, started, directory / "log", time.monotonic() + START_TIMEOUT_S)
        yield service.address
    finally:
        end(started, STOP_GRACE_S)


def delete_namespace(url: str, namespace: str) -> None:
    """Delete the benchmark's keys from a Redis that others may use too."""
    with Redis.from_url(url, **redis_settings(url)) as client:
        for key in client.scan_iter(match=f"{namespace}:*", count=1000):
            client.unlink(key)


class RawReader:
    """Pipelined `GET`s over a bare socket into existing memory: no parsing, checks or allocation.

    Measured against `MGET` and redis-py's `mget`, this is the fastest of the three.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "redis" or redis_settings(url) or parts.path not in ("", "/", "/0"):
            raise UserError("redis_url: the lower bound needs a Redis at redis://host:port/0 without a password")
        self._socket = socket.create_connection((parts.hostname or "localhost", parts.port or 6379), READ_TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The kernel limits the time: a timeout in Python would add a poll to each read.
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", READ_TIMEOUT_S, 0))
        self._buffer = bytearray()

    def read_ms(self, keys: Sequence[bytes], value_bytes: int) -> float:
        """Milliseconds to receive the values of `keys`, each of `value_bytes`. Raises `RuntimeError` otherwise."""
        commands = b"".join(encode_command([b"GET", key]) for key in keys)
        announced = b"$%d\r\n" % value_bytes
        stride = len(announced) + value_bytes + 2
        size = len(keys) * stride
        if len(self._buffer) != size:
            self._buffer = bytearray(size)
        view = memoryview(self._buffer)
        began_s = time.perf_counter()
        self._socket.sendall(commands)
        at = 0
        while at < size:
            received = self._socket.recv_into(view[at:], 0, socket.MSG_WAITALL)
            if not received:
                raise RuntimeError("Redis closed the bare connection")
            at += received
        took_ms = (time.perf_counter() - began_s) * 1000
        if any(view[start : start + len(announced)] != announced for start in range(0, size, stride)):
            raise RuntimeError("Redis does not have the chunks whose transfer is measured")
        return took_ms

    def close(self) -> None:
        self._socket.close()

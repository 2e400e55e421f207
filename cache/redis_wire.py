"""A client for the part of Redis's protocol (RESP2) that the remote tier needs, with a deadline for each call.

In redis-py, the socket time-out starts again at every `recv`: a server that sends single bytes can block a reader for
ever. Besides, an interrupted pipeline returns none of the values that have arrived. Here each call has one `Deadline`,
values are read one by one, and each is received directly into its final memory.
"""

import contextlib
import socket
import ssl
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Self

from redis.connection import SSLConnection, UnixDomainSocketConnection, parse_url

from core.credentials import Credentials, credentials, without_secrets
from core.errors import UserError
from core.redis_config import RedisAccessConfig

_LINE_BUFFER_BYTES = 4096
_MOST_PIECES = 512
"""Maximum number of pieces per system call. The limit of Linux is 1,024."""
_LONGEST_LINE_BYTES = 1024


class WireError(Exception):
    """The connection ended, or the protocol was violated. The connection cannot be used any more."""


class ReplyError(Exception):
    """Redis answered with an error. The connection can still be used."""


class ClusterModeError(ReplyError):
    """Redis is a node of a cluster, and the key belongs to another node."""


_CLUSTER_REPLIES = ("MOVED ", "ASK ", "CLUSTERDOWN", "CROSSSLOT")
"""How error replies begin that only a Redis in cluster mode sends."""


class Deadline:
    """A point in real time by which an operation must end."""

    def __init__(self, timeout_ms: float) -> None:
        self._at_s = time.monotonic() + timeout_ms / 1000.0

    def remaining_s(self) -> float:
        """Seconds left, above 0. Raises `TimeoutError` if there are none."""
        left_s = self._at_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the deadline has passed")
        return left_s


@dataclass(frozen=True)
class RedisAddress:
    """Address and credentials of a Redis. Its text, and so log lines, have no credentials."""

    host: str
    port: int
    db: int
    unix_path: str | None = None
    tls: bool = False
    tls_ca_file: str | None = None
    asks_as: Credentials | None = field(default=None, repr=False)

    @classmethod
    def of(cls, url: str, access: RedisAccessConfig) -> Self:
        """From `redis://host[:port][/db]`, `rediss://...[?ssl_ca_certs=file]` or `unix://path`, with credentials.

        Raises `UserError` for any other URL, and for credentials that this host cannot read.
        """
        return replace(cls.parse(url), asks_as=credentials("redis", access.redis_credentials_file))

    @classmethod
    def parse(cls, url: str) -> Self:
        """The address without credentials. Raises `UserError` that names `redis_url`, but does not show the URL."""
        try:
            options: dict[str, Any] = parse_url(url)  # type: ignore[no-untyped-call]
            options.get("host", "localhost").encode(
                "idna"
            )  # Fails here for names that resolution could not encode later.
        except ValueError:
            raise UserError("redis_url: not a Redis URL; write redis://host:port/db") from None
        kind = options.pop("connection_class", None)
        address = cls(
            host=options.pop("host", "localhost"),
            port=options.pop("port", 6379),
            db=options.pop("db", 0),
            unix_path=options.pop("path", None),
            tls=kind is SSLConnection,
            tls_ca_file=options.pop("ssl_ca_certs", None),
        )
        if options:
            raise UserError(f"redis_url: option {sorted(options)[0]} is not supported; remove it")
        if kind is UnixDomainSocketConnection and not address.unix_path:
            raise UserError("redis_url: names no socket; write unix:///path/to/redis.sock")
        return address

    def __str__(self) -> str:
        return f"{self.unix_path or f'{self.host}:{self.port}'}/{self.db}"


class RedisConnection:
    """One connection. After any exception except `ReplyError`, the caller must close it and open another."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = bytearray(_LINE_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0

    @classmethod
    def open(cls, address: RedisAddress, deadline: Deadline) -> Self:
        """Connect, authenticate and select the database.

        Raises `OSError`, `WireError` or `ReplyError`. Name resolution may take longer than the deadline.
        """
        sock = _connect(address, deadline)
        try:
            connection = cls(sock)
            for command in _greeting(address):
                connection.send([encode_command(command)], deadline)
                connection.read_reply(deadline)
        except ReplyError as error:
            # A server that does not know a command repeats its arguments, which may be secrets.
            sock.close()
            raise ReplyError(without_secrets(str(error))) from None
        except BaseException:
            sock.close()
            raise
        return connection

    def send(self, pieces: Iterable[bytes | memoryview], deadline: Deadline) -> None:
        """Send all pieces in as few system calls as possible, so that few segments wake Redis up."""
        left = deque(memoryview(piece) for piece in pieces if len(piece))
        while left:
            # `sendall` would apply the time-out to each of its parts.
            self._socket.settimeout(deadline.remaining_s())
            # TLS sends one piece at a time.
            at_once = 1 if isinstance(self._socket, ssl.SSLSocket) else _MOST_PIECES
            sent = self._socket.send(left[0]) if at_once == 1 else self._socket.sendmsg(islice(left, at_once))
            while left and sent >= len(left[0]):
                sent -= len(left.popleft())
            if sent:
                left[0] = left[0][sent:]

    def read_line(self, deadline: Deadline) -> bytes:
        """Read one line, and return it without its line end."""
        while (at := self._buffer.find(b"\r\n", self._start, self._end)) < 0:
            if self._end - self._start > _LONGEST_LINE_BYTES:
                raise WireError("a line without end")
            if self._start:
                self._buffer[: self._end - self._start] = self._buffer[self._start : self._end]
                self._start, self._end = 0, self._end - self._start
            self._end += self._receive(self._view[self._end :], deadline)
        line = bytes(self._view[self._start : at])
        self._start = at + 2
        return line

    def read_into(self, target: memoryview, deadline: Deadline) -> None:
        """Fill `target` (bytes) with the next bytes of the stream."""
        at = min(len(target), self._end - self._start)
        target[:at] = self._view[self._start : self._start + at]
        self._start += at
        while at < len(target):
            at += self._receive(target[at:], deadline)

    def read_bulk_length(self, deadline: Deadline) -> int | None:
        """The length of the next value, to be read by `read_into` and then `end_bulk`. `None` if there is no value."""
        kind, text = self._read_typed_line(deadline)
        if kind != b"$":
            raise WireError("a value was expected")
        length = _integer(text)
        return None if length < 0 else length

    def end_bulk(self, deadline: Deadline) -> None:
        """Read the line end after a value."""
        if self.read_line(deadline) != b"":
            raise WireError("a value longer than announced")

    def read_reply(self, deadline: Deadline) -> int | bytes:
        """A status line (as bytes) or an integer. Raises `ReplyError` for error replies."""
        kind, text = self._read_typed_line(deadline)
        if kind == b":":
            return _integer(text)
        if kind == b"+":
            return text
        raise WireError("a status or a number was expected")

    def close(self) -> None:
        """Close the connection. A thread that waits on it gets an error at once. Idempotent."""
        with contextlib.suppress(OSError):  # It may have ended already.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read_typed_line(self, deadline: Deadline) -> tuple[bytes, bytes]:
        line = self.read_line(deadline)
        if line[:1] == b"-":
            text = line[1:].decode("utf-8", "replace")
            raise ClusterModeError(text) if text.startswith(_CLUSTER_REPLIES) else ReplyError(text)
        return line[:1], line[1:]

    def _receive(self, target: memoryview, deadline: Deadline) -> int:
        self._socket.settimeout(deadline.remaining_s())
        received = self._socket.recv_into(target)
        if not received:
            raise WireError("Redis closed the connection")
        return received


def encode_command(arguments: Iterable[bytes]) -> bytes:
    """A command in Redis's wire format."""
    parts = [b"$%d\r\n%b\r\n" % (len(argument), argument) for argument in arguments]
    return b"*%d\r\n%b" % (len(parts), b"".join(parts))


def _connect(address: RedisAddress, deadline: Deadline) -> socket.socket:
    if address.unix_path is not None:
        local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            local.settimeout(deadline.remaining_s())
            local.connect(address.unix_path)
        except BaseException:
            local.close()
            raise
        return local
    sock = socket.create_connection((address.host, address.port), timeout=deadline.remaining_s())
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if address.tls:
            sock.settimeout(deadline.remaining_s())
            context = ssl.create_default_context(cafile=address.tls_ca_file)
            return context.wrap_socket(sock, server_hostname=address.host)
    except BaseException:
        sock.close()
        raise
    return sock


def _greeting(address: RedisAddress) -> Iterable[list[bytes]]:
    if (user := address.asks_as) is not None:
        name = [] if user.username is None else [user.username.encode()]
        yield [b"AUTH", *name, user.password.get_secret_value().encode()]
    if address.db:
        yield [b"SELECT", b"%d" % address.db]


def _integer(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise WireError("a number was expected") from None

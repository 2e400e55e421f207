"""Opens the connection for lookups in a thread of its own, because name resolution has no time-out."""

import threading

from cache.redis_wire import Deadline, RedisAddress, RedisConnection

_DIAL_TIMEOUT_MS = 2000.0
"""Time-out of one connection attempt. It can outlast its lookup. Then the next lookup uses the connection."""


class _Attempt:
    def __init__(self, address: RedisAddress) -> None:
        self.done = threading.Event()
        self.connection: RedisConnection | None = None
        self.error: Exception | None = None
        self._address = address
        self._lock = threading.Lock()
        self._abandoned = False
        threading.Thread(target=self._dial, name="cache-dialer", daemon=True).start()

    def abandon(self) -> None:
        """Close the connection that the attempt has opened or will open."""
        with self._lock:
            self._abandoned = True
            if self.connection is not None:
                self.connection.close()

    def _dial(self) -> None:
        try:
            connection = RedisConnection.open(self._address, Deadline(_DIAL_TIMEOUT_MS))
        except Exception as error:  # Raised again in the thread that called `connect`.
            self.error = error
        else:
            with self._lock:
                self.connection = connection
                if self._abandoned:
                    connection.close()
        self.done.set()


class Dialer:
    """Makes at most one attempt at a time. For use by one thread."""

    def __init__(self, address: RedisAddress) -> None:
        self._address = address
        self._attempt: _Attempt | None = None

    def connect(self, deadline: Deadline) -> RedisConnection:
        """A new connection, maybe from an attempt of an earlier call. Raises `TimeoutError`, or the attempt's error."""
        attempt = self._attempt or _Attempt(self._address)
        self._attempt = attempt
        if not attempt.done.wait(deadline.remaining_s()):
            raise TimeoutError("still connecting")
        self._attempt = None
        if attempt.connection is None:
            raise attempt.error or RuntimeError("an attempt ended without a result")
        return attempt.connection

    def close(self) -> None:
        """Abandon an attempt that is under way."""
        if self._attempt is not None:
            self._attempt.abandon()
            self._attempt = None

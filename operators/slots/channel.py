"""The connection between Flink's worker and the process of a slot."""

import pickle
import select
import threading
from multiprocessing.connection import Connection
from typing import Any


class ChannelClosedError(EOFError):
    """The other end of the channel is closed."""


class Channel:
    """One end of a connection. Any thread may send, one receives.

    Raises `ChannelClosedError` once the other end is closed.

    For small messages, this costs a fifth of `Connection.send`, `recv` and `poll`, which make a pickler in Python for
    each message, and a selector for each poll.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._poll = select.poll()
        self._poll.register(connection.fileno(), select.POLLIN)

    def send(self, what: Any) -> None:
        packed = pickle.dumps(what, pickle.HIGHEST_PROTOCOL)
        with self._sending:
            try:
                self._connection.send_bytes(packed)
            except OSError as error:
                raise ChannelClosedError from error

    def receive(self) -> Any:
        try:
            return pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise ChannelClosedError from error

    def poll(self, timeout_s: float) -> bool:
        """Wait for up to `timeout_s`. True if a message has arrived, or the other end is closed."""
        return bool(self._poll.poll(timeout_s * 1000))

    def close(self) -> None:
        self._connection.close()

"""Runs a slot in a process of its own. This module is the side of Flink's worker.

In one process, the engine and the threads of the worker would share an interpreter lock, and each poll of the stream
would delay a step of the engine. Besides, the worker survives whatever kills the engine.
"""

import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from core.errors import UserError
from operators.config import JobConfig
from operators.envelope import Answer, Envelope, MicroBatch, Ready, RecordPosition, SlotStats
from operators.slots.channel import Channel

SERVER = "operators.slots.server"
END_TIMEOUT_S = 10.0
"""Maximum time for the process to finish its step or micro-batch once it is told to end."""


@dataclass(frozen=True)
class Start:
    """The first message to the process."""

    config: JobConfig
    slot: int
    log_level: int


@dataclass(frozen=True)
class Refused:
    """The slot cannot be made with the user's configuration."""

    reason: str


@dataclass(frozen=True)
class Broken:
    """The slot raised an error that does not belong to a single request."""

    traceback: str


@dataclass(frozen=True)
class Began:
    """The engine is about to begin with the requests at `positions`."""

    positions: Sequence[RecordPosition]


@dataclass(frozen=True)
class Heartbeat:
    """The process is alive: between two passes, or idle."""

    stats: SlotStats


SlotMessage = Ready | Began | Heartbeat | list[Answer]


class SlotDiedError(RuntimeError):
    """The process has ended though nobody told it to; `how` says it in one line."""

    def __init__(self, how: str, details: str = "") -> None:
        super().__init__(f"the slot's process {how}\n{details}".rstrip())
        self.how = how


class SlotProcess:
    """Starts the process, which loads its slot, sends `Ready`, and then answers requests.

    One thread may receive. Any thread may send, kill or end.
    """

    def __init__(self, config: JobConfig, slot: int) -> None:
        """Does not wait for the process. Raises `SlotDiedError` if it cannot be started."""
        self._socket, theirs = socket.socketpair()
        # If the process stops in the middle of a message, the reader must not wait for the rest for ever.
        longest = struct.pack("@ll", int(config.supervision.engine_timeout_s) + 1, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, longest)
        self._channel = Channel(Connection(os.dup(self._socket.fileno())))
        self._outbox: SimpleQueue[Any] = SimpleQueue()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", SERVER, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    # Files that were submitted with the job are on the path of Flink's worker only.
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                )
            except OSError as error:
                self._channel.close()
                self._socket.close()
                raise SlotDiedError(f"could not be started: {error}") from error
        self._sender = threading.Thread(target=self._write, name="to-slot", daemon=True)
        self._sender.start()
        self._outbox.put(Start(config, slot, logging.getLogger().getEffectiveLevel()))

    def send(self, order: Envelope | MicroBatch) -> None:
        """Send a request or a micro-batch. Neither waits nor raises: `receive` raises once the process has ended."""
        self._outbox.put(order)

    def receive(self, timeout_s: float) -> SlotMessage | None:
        """Return the next message, or None after `timeout_s`. Log records of the process go to this process's log.

        Raises `UserError` if the slot cannot be made with the user's configuration, and `SlotDiedError` once the
        process has ended.
        """
        until_s = time.monotonic() + timeout_s
        while True:
            try:
                if not self._channel.poll(max(0.0, until_s - time.monotonic())):
                    return None
                message = self._channel.receive()
            except (EOFError, OSError):
                raise self._died() from None
            if isinstance(message, Refused):
                raise UserError(message.reason)
            if isinstance(message, Broken):
                raise SlotDiedError(f"failed: {message.traceback.strip().splitlines()[-1]}", message.traceback)
            if not isinstance(message, logging.LogRecord):
                found: SlotMessage = message
                return found
            logging.getLogger(message.name).handle(message)

    def kill(self) -> None:
        """Kill the process at once."""
        self._process.kill()

    def end(self) -> None:
        """End the process. `receive` then raises `SlotDiedError`."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        if not self._has_ended():
            self._process.kill()
            # A process that waits for a device driver in the kernel can survive even this.
            self._has_ended()

    def close(self) -> None:
        """End the process and close the channel. No other thread may send or receive meanwhile."""
        self.end()
        self._outbox.put(None)
        self._sender.join()
        self._channel.close()
        self._socket.close()

    def _write(self) -> None:
        """Send `Start`, then the orders in the outbox, as many at a time as there are."""
        with suppress(EOFError):
            self._channel.send(self._outbox.get())
            while True:
                orders = [self._outbox.get()]
                while not self._outbox.empty():
                    orders.append(self._outbox.get())
                if None in orders:
                    return
                self._channel.send(orders)

    def _has_ended(self) -> bool:
        """Wait for up to `END_TIMEOUT_S`. True if the process has ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_TIMEOUT_S)
        return self._process.returncode is not None

    def _died(self) -> SlotDiedError:
        if not self._has_ended():
            return SlotDiedError("does not answer any more")
        status = self._process.returncode
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return SlotDiedError(f"was ended {how}")

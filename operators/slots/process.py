"""A slot in a process of its own, as Flink's worker sees it.

The engine and the threads of Flink's worker would otherwise take turns at one interpreter lock, and each poll of the
stream would hold up a step of the engine. What takes the engine down leaves the worker alive.
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
"""Longest that a step, or a micro-batch, may take to end once nobody waits for it any more."""


@dataclass(frozen=True)
class Start:
    """The first thing that the process is told."""

    config: JobConfig
    slot: int
    log_level: int


@dataclass(frozen=True)
class Refused:
    """The slot cannot be made of what the user gave."""

    reason: str


@dataclass(frozen=True)
class Broken:
    """The slot raised an error that is no single request's."""

    traceback: str


@dataclass(frozen=True)
class Began:
    """The engine is about to begin with the requests that stand at `positions`."""

    positions: Sequence[RecordPosition]


@dataclass(frozen=True)
class Heartbeat:
    """The process lives: between two passes, or idle."""

    stats: SlotStats


SlotMessage = Ready | Began | Heartbeat | list[Answer]


class SlotDiedError(RuntimeError):
    """The process has ended though nobody told it to; `how` says it in one line."""

    def __init__(self, how: str, details: str = "") -> None:
        super().__init__(f"the slot's process {how}\n{details}".rstrip())
        self.how = how


class SlotProcess:
    """Starts the process. It loads its slot, says so by `Ready`, and then answers what it is sent.

    One thread hears; any may send, kill or end.
    """

    def __init__(self, config: JobConfig, slot: int) -> None:
        """Does not wait for the process. Raises `SlotDiedError` where there can be none."""
        self._socket, theirs = socket.socketpair()
        # Should it stop in the midst of a message, nobody may wait for the rest of it for ever.
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
                    # Flink puts what was submitted with the job on the path of its worker only.
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
        """Hand over a request that may enter and leave by itself, or a closed group. Never waits.

        What comes of it is heard: should the process end, nothing does.
        """
        self._outbox.put(order)

    def receive(self, timeout_s: float) -> SlotMessage | None:
        """What it says next, within `timeout_s`. Its log records go to this process's log.

        Raises `UserError` where the slot cannot be made of what the user gave, `SlotDiedError` once it has ended.
        """
        until_s = time.monotonic() + timeout_s
        while True:
            try:
                if not self._channel.poll(max(0.0, until_s - time.monotonic())):
                    return None
                said = self._channel.receive()
            except (EOFError, OSError):
                raise self._died() from None
            if isinstance(said, Refused):
                raise UserError(said.reason)
            if isinstance(said, Broken):
                raise SlotDiedError(f"failed: {said.traceback.strip().splitlines()[-1]}", said.traceback)
            if not isinstance(said, logging.LogRecord):
                found: SlotMessage = said
                return found
            logging.getLogger(said.name).handle(said)

    def kill(self) -> None:
        """End it at once, whatever it does."""
        self._process.kill()

    def end(self) -> None:
        """End the process: who hears is told that it has died."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        if not self._has_ended():
            self._process.kill()
            # A process that waits for a device's driver in the kernel may outlive even that.
            self._has_ended()

    def close(self) -> None:
        """End it, and close the way to it: nobody may send or receive meanwhile."""
        self.end()
        self._outbox.put(None)
        self._sender.join()
        self._channel.close()
        self._socket.close()

    def _write(self) -> None:
        """Send `Start`, and then whatever has come meanwhile as a list of orders."""
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
        """Whether it has, within `END_TIMEOUT_S`."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_TIMEOUT_S)
        return self._process.returncode is not None

    def _died(self) -> SlotDiedError:
        if not self._has_ended():
            return SlotDiedError("does not speak any more")
        status = self._process.returncode
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return SlotDiedError(f"was ended {how}")

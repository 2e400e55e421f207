"""A slot in a process of its own, as Flink's worker sees it.

The engine and the threads of Flink's worker would otherwise take turns at one interpreter lock, and each poll of the
stream would hold up a step of the engine. What takes the engine down leaves the worker alive to say so.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from core.config import JobConfig
from core.errors import UserError
from operators.envelope import Answer, Envelope, Group, Ready

SERVER = "operators.slot_server"
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


class SlotDiedError(RuntimeError):
    """The process has ended though nobody told it to."""


class SlotProcess:
    """Starts the process and waits until its slot is ready; raises `UserError` where that cannot be.

    One thread may send while another receives. Raises `SlotDiedError` from either once the process has ended.
    """

    def __init__(self, config: JobConfig, slot: int) -> None:
        self._socket, theirs = socket.socketpair()
        self._connection = Connection(os.dup(self._socket.fileno()))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", SERVER, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # Flink puts what was submitted with the job on the path of its worker only.
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        try:
            self._send(Start(config, slot, logging.getLogger().getEffectiveLevel()))
            said = self._hear()
            if isinstance(said, Refused):
                raise UserError(said.reason)
        except BaseException:
            self.close()
            raise
        self.ready: Ready = said

    def send(self, order: Envelope | Group) -> None:
        """Hand over a request that may enter and leave by itself, or a closed group."""
        self._send(order)

    def receive(self) -> list[Answer]:
        """What has finished, of requests sent one by one or of one whole group; waits for it."""
        answers: list[Answer] = self._hear()
        return answers

    def answer(self, batch: Sequence[Envelope]) -> list[Answer]:
        """Answer a closed group, in the order in which its requests finish."""
        self._send(Group(batch))
        return self.receive()

    def end(self) -> None:
        """End the process: who receives is told that it has died."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """End it, and close the way to it: nobody may send or receive meanwhile."""
        self.end()
        self._connection.close()
        self._socket.close()

    def _send(self, what: Any) -> None:
        try:
            self._connection.send(what)
        except OSError:
            raise self._died() from None

    def _hear(self) -> Any:
        while True:
            try:
                said = self._connection.recv()
            except (EOFError, OSError):
                raise self._died() from None
            if isinstance(said, Broken):
                raise SlotDiedError(f"the slot's process failed\n{said.traceback}")
            if not isinstance(said, logging.LogRecord):
                return said
            logging.getLogger(said.name).handle(said)

    def _died(self) -> SlotDiedError:
        try:
            status = self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return SlotDiedError("the slot's process does not speak any more")
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return SlotDiedError(f"the slot's process was ended {how}")

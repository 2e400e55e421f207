"""The process of a slot: loads the slot, takes in requests between two steps of its engine, and sends answers.

`operators.slots.process` starts it with the number of the socket between the two. It ends when the other side ends.
"""

import ctypes
import gc
import json
import logging
import logging.config
import signal
import sys
import traceback
from contextlib import ExitStack, closing
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from pathlib import Path

from core.clock import Clock, SystemClock
from core.errors import UserError
from operators.config import Batching, JobConfig
from operators.envelope import MicroBatch
from operators.shared_state.slot_loads import LoadReporter, SharedLoads
from operators.slots.channel import Channel, ChannelClosedError
from operators.slots.process import Began, Broken, Heartbeat, Refused, Start
from operators.slots.slot import InferenceSlot

PR_SET_PDEATHSIG = 1
"""Option of Linux's `prctl`: the signal that a process gets when its parent ends."""
HEARTBEAT_S = 0.5
"""Time between two heartbeats."""


class ChannelLogHandler(QueueHandler):
    """Sends log records to the worker, whose log is Flink's."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(queue=channel)  # type: ignore[arg-type]

    def enqueue(self, record: logging.LogRecord) -> None:
        self.queue.send(record)  # type: ignore[attr-defined]


class HeartbeatSender:
    """Sends the worker heartbeats with the statistics of the slot, at most one every `HEARTBEAT_S`."""

    def __init__(self, channel: Channel, clock: Clock) -> None:
        self._channel = channel
        self._clock = clock
        self._next_ms = clock.monotonic_ms()

    def beat(self, slot: InferenceSlot) -> None:
        now_ms = self._clock.monotonic_ms()
        if now_ms >= self._next_ms:
            self._next_ms = now_ms + HEARTBEAT_S * 1e3
            self._channel.send(Heartbeat(slot.stats))


def serve(channel: Channel, slot: InferenceSlot, heartbeat: HeartbeatSender) -> None:
    """Answer requests until `ChannelClosedError` is raised."""
    while True:
        heartbeat.beat(slot)
        if channel.poll(0.0 if slot.unfinished else HEARTBEAT_S):
            for order in channel.receive():
                if isinstance(order, MicroBatch):
                    channel.send(slot.answer(order.envelopes))
                elif (refused := slot.submit(order)) is not None:
                    channel.send([refused])
        elif slot.unfinished and (answers := slot.step()):
            channel.send(answers)


def run(channel: Channel) -> None:
    start: Start = channel.receive()
    to_worker = ChannelLogHandler(channel)
    # The handler's own level holds even if --slot-logging lowers that of the loggers.
    to_worker.setLevel(start.log_level)
    # The worker's log adds level and name.
    logging.basicConfig(level=start.log_level, format="%(message)s", handlers=[to_worker])
    clock = SystemClock()
    heartbeat = HeartbeatSender(channel, clock)
    with ExitStack() as opened:
        try:
            if start.config.slot_logging is not None:
                configure_logging(start.config.slot_logging)
            slot = InferenceSlot(
                start.config,
                start.slot,
                clock,
                on_begin=lambda positions: channel.send(Began(positions)),
                on_pass=lambda: heartbeat.beat(slot),
            )
        except UserError as error:
            channel.send(Refused(str(error)))
            return
        opened.enter_context(closing(slot))
        # Nothing that is loaded by now becomes garbage: collections need not look at it again.
        gc.collect()
        gc.freeze()
        _report(opened, start.config, slot)
        channel.send(slot.ready)
        serve(channel, slot, heartbeat)


def configure_logging(path: Path) -> None:
    """Apply the logging configuration in the JSON file at `path`. Records go to the worker as well.

    Raises `UserError` if the file is not valid.
    """
    try:
        stated = {"version": 1, "disable_existing_loggers": False} | json.loads(path.read_bytes())
        logging.config.dictConfig(stated)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        reason = " ".join(f"{error}: {error.__cause__ or ''}".split()).rstrip(": ")
        raise UserError(
            f"--slot-logging: {path} is not a configuration for Python's logging ({reason}); correct it"
        ) from None


def _report(opened: ExitStack, config: JobConfig, slot: InferenceSlot) -> None:
    """Report the engine's queue for placement. Micro-batches queue in front of the slot and are reported there."""
    shared = SharedLoads.of(config) if config.batching.batching is Batching.CONTINUOUS else None
    if shared is not None:
        opened.enter_context(closing(LoadReporter(shared, slot.index, lambda: slot.queue_ms)))


def end_with_worker() -> None:
    """Ask the kernel to kill this process as soon as the worker ends, even during a load, or a pass that hangs.

    Otherwise this process would hold the device's memory, which its successor needs.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    end_with_worker()
    # Ctrl-C in a terminal is for the worker. This process ends with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel(Connection(int(sys.argv[1])))
    try:
        run(channel)
    except ChannelClosedError:
        return
    except Exception:
        channel.send(Broken(traceback.format_exc()))
        raise


if __name__ == "__main__":
    main()

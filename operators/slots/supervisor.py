"""Replaces a slot's process that dies or hangs, and retries its requests.

The death of a process does not fail the job: a restart of the job would load every model again, and repeat all requests
in flight. `RetryTracker` keeps the requests and finds the one that kills processes. The slot fails only after several
deaths in a row without an answer between them. Then Flink's restart strategy takes over.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Protocol

from core.clock import Clock
from core.records import DeadLetter
from operators.config import Batching, JobConfig
from operators.envelope import Answer, Envelope, MicroBatch, QueueState, Ready
from operators.metrics.slot_metrics import SlotMetrics
from operators.slots.process import Began, Heartbeat, SlotDiedError, SlotMessage, SlotProcess
from operators.slots.retry_tracker import Retry, RetryTracker

logger = logging.getLogger(__name__)

LOOK_S = 0.25
"""Maximum wait for a message of the process before time-outs are checked."""
FIRST_BACKOFF_S = 1.0
MOST_BACKOFF_S = 30.0


def backoff_s(deaths: int) -> float:
    """Delay before the next start after this many deaths in a row: none after the first, then doubling each time."""
    return 0.0 if deaths < 2 else min(MOST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(deaths - 2, 16))


class Process(Protocol):
    """A slot's process: see `operators.slots.process.SlotProcess`."""

    def send(self, order: Envelope | MicroBatch) -> None: ...

    def receive(self, timeout_s: float) -> SlotMessage | None: ...

    def kill(self) -> None: ...

    def end(self) -> None: ...

    def close(self) -> None: ...


class Supervisor:
    """A slot that survives the death of its process. One thread may send, and one may receive.

    The constructor waits until the first process is ready. Raises `UserError` if the slot cannot be made with the
    user's configuration, and `SlotDiedError` once it has given up.
    """

    def __init__(
        self,
        config: JobConfig,
        slot: int,
        clock: Clock,
        metrics: SlotMetrics,
        start: Callable[[JobConfig, int], Process] = SlotProcess,
    ) -> None:
        self._limits = config.supervision
        self._grouped = config.batching.batching is Batching.MICRO
        self._start = partial(start, config, slot)
        self._clock = clock
        self._requests = RetryTracker(config.supervision.max_attempts, config.engine.request_timeout_ms)
        self._metrics = metrics
        self._changing = threading.Lock()
        """Held while `_requests` or `_process` changes."""
        self._process: Process | None = None
        self._serves = False
        """True while the process is ready for requests."""
        self._heard_ms = 0.0
        self._deaths = 0
        """Number of deaths since the last answer."""
        self._ended = threading.Event()
        self._ready: Future[Ready] = Future()
        self._came: SimpleQueue[list[Answer | Retry] | BaseException] = SimpleQueue()
        metrics.queue, metrics.waiting_since_ms = self._queue, self._waiting_since_ms
        self._thread = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        self._thread.start()
        try:
            self.ready = self._ready.result()
        except BaseException:
            self.close()
            raise

    def send(self, order: Envelope) -> None:
        """Submit a request. Never waits for the process."""
        self._take([order])

    def receive(self) -> list[Answer | Retry]:
        """Wait for answers and retries, and return them."""
        came = self._came.get()
        if isinstance(came, BaseException):
            self._came.put(came)
            raise came
        return came

    def answer(self, batch: Sequence[Envelope]) -> list[Answer]:
        """Answer a micro-batch. The answers are in the order in which their requests finish."""
        self._take(batch)
        answers: list[Answer] = []
        while len(answers) < len(batch):
            answers += [one for one in self.receive() if isinstance(one, Answer)]
        return answers

    def end(self) -> None:
        """End the process for good. `receive` then raises `SlotDiedError`."""
        self._ended.set()
        with self._changing:
            process = self._process
        if process is not None:
            process.end()

    def close(self) -> None:
        self.end()
        self._thread.join()

    def _take(self, envelopes: Sequence[Envelope]) -> None:
        with self._changing:
            for envelope in envelopes:
                self._requests.take(envelope)
            self._give()

    def _give(self) -> None:
        """Send the requests that the process may have now."""
        if self._process is None or not self._serves:
            return
        envelopes = self._requests.give()
        orders = [MicroBatch(envelopes)] if self._grouped and envelopes else envelopes
        for order in orders:
            self._process.send(order)

    def _supervise(self) -> None:
        try:
            while True:
                if came := [*self._next(), *self._expired()]:
                    self._came.put(came)
        except BaseException as error:  # raised again in the thread that calls `receive`
            if self._process is not None:
                self._process.close()
            if not self._ready.done():
                self._ready.set_exception(error)
            self._came.put(error)

    def _next(self) -> list[Answer | Retry]:
        """Wait for the next message or death, for `LOOK_S` at most, and return what results from it."""
        try:
            if self._process is None:
                self._replace()
                return []
            return self._handle(self._receive_from(self._process))
        except SlotDiedError as death:
            return self._bury(death)

    def _replace(self) -> None:
        if self._ended.wait(backoff_s(self._deaths)):
            raise SlotDiedError("was ended")
        process = self._start()
        self._heard_ms = self._clock.monotonic_ms()
        with self._changing:
            self._process = process
        # A call of `end` in the meantime found no process to end.
        if self._ended.is_set():
            process.end()

    def _receive_from(self, process: Process) -> SlotMessage | None:
        asked_ms = self._clock.monotonic_ms()
        message = process.receive(LOOK_S)
        if message is not None:
            self._heard_ms = self._clock.monotonic_ms()
            return message
        # Measured up to the question: if this process was suspended since, messages that came then are still unread.
        most_s = self._limits.engine_timeout_s if self._serves else self._limits.load_timeout_s
        if asked_ms - self._heard_ms > most_s * 1e3:
            process.kill()
            raise SlotDiedError(f"hung: it sent nothing for {most_s:g} s")
        return None

    def _handle(self, message: SlotMessage | None) -> list[Answer | Retry]:
        if isinstance(message, Ready):
            self._metrics.set_ready(True)
            with self._changing:
                self._serves = True
                self._give()
            if not self._ready.done():
                self._ready.set_result(message)
        elif isinstance(message, Heartbeat):
            self._metrics.update(message.stats)
        elif isinstance(message, Began):
            with self._changing:
                self._requests.began(message.positions)
        elif isinstance(message, list):
            with self._changing:
                for answer in message:
                    self._requests.answered(answer.position)
                self._give()
            if not all(isinstance(answer.record, DeadLetter) for answer in message):
                self._deaths = 0
            return list(message)
        return []

    def _bury(self, death: SlotDiedError) -> list[Answer | Retry]:
        """Return the requests of the dead process as retries and dead letters."""
        with self._changing:
            process, self._process, self._serves = self._process, None, False
            came = self._requests.lost(death.how)
        self._metrics.set_ready(False)
        if process is not None:
            process.close()
        if self._ended.is_set():
            raise death
        self._deaths += 1
        if self._deaths > self._limits.slot_restarts:
            raise SlotDiedError(f"{death.how}; that was death {self._deaths} in a row without an answer") from death
        self._metrics.restarts.inc()
        self._metrics.retries.inc(sum(isinstance(one, Retry) for one in came))
        delay_s = backoff_s(self._deaths)
        logger.warning("with %d requests running, %s\nThe next process starts in %g s", len(came), death, delay_s)
        return came

    def _queue(self) -> QueueState:
        with self._changing:
            return self._requests.queue

    def _waiting_since_ms(self) -> float | None:
        with self._changing:
            return self._requests.waiting_since_ms

    def _expired(self) -> list[Answer]:
        with self._changing:
            return list(self._requests.expire(self._clock.wall_ms()))

"""Connects a Flink function to a slot for continuous batching.

The function submits requests without waiting for answers, and collects answers when they are there. The slot's process
takes in new requests between two steps, so a request joins the running batch one step after its arrival.

This stands beside the supervisor, and not in it: keeping the answers of Flink's keys apart and limiting the requests in
flight are independent of how a slot survives the death of its process, and micro-batches need only the latter.
"""

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Protocol

from core.clock import Clock
from operators.envelope import Answer, Envelope, RecordPosition
from operators.slots.retry_tracker import Retry


class Serving(Protocol):
    """A slot that answers requests by itself. One thread may send, and another may receive."""

    def send(self, order: Envelope) -> None: ...

    def receive(self) -> list[Answer | Retry]:
        """Wait for answers and retries, and return them. Raises once the slot has ended."""
        ...

    def end(self) -> None:
        """End the slot soon."""
        ...


class Pump:
    """Submits requests of several owners (Flink keys) to one slot, and collects each owner's answers separately.

    All calls must come from one thread. If the slot fails, every call raises `RuntimeError`.
    """

    def __init__(self, slot: Serving, max_in_flight: int, clock: Clock, rows: int = 1) -> None:
        """`rows`: number of sequences that the slot runs together. Waiting requests fill at least these rows."""
        self._slot = slot
        self._max_in_flight = max_in_flight
        # Resuming after each single answer would make the stream and the slot wait for each other at every request.
        self._resume_at = max_in_flight - max(1, (max_in_flight - rows) // 2)
        self._is_full = False
        self._clock = clock
        self._changed = threading.Condition()
        self._awaited: Callable[[], object] = lambda: False
        """What the calling thread waits for. It is woken for nothing else, since a wake-up costs a thread switch."""
        self._finished: dict[int, list[Answer]] = defaultdict(list)
        self._retried: dict[int, dict[RecordPosition, Envelope]] = defaultdict(dict)
        self._owners: dict[RecordPosition, int] = {}
        """Owner of each request in the slot."""
        self._outstanding: dict[int, int] = defaultdict(int)
        """By owner, the number of requests whose answers it has not collected."""
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._receive, name="answers", daemon=True)
        self._thread.start()

    def submit(self, owner: int, envelope: Envelope) -> None:
        """Submit a request. Does not wait for the engine."""
        with self._changed:
            self._require_alive()
            self._owners[envelope.position] = owner
            self._outstanding[owner] += 1
        self._slot.send(envelope)

    @property
    def in_flight(self) -> int:
        """Number of requests of all owners that the slot has not answered."""
        return len(self._owners)

    def outstanding(self, owner: int) -> int:
        """Number of requests of `owner` whose answers it has not collected."""
        return self._outstanding[owner]

    def wait_for_capacity(self, timeout_s: float) -> bool:
        """Return true as soon as another request may be submitted, or false after `timeout_s`.

        Once the slot is full, this waits until half of the queued requests are answered. After `timeout_s`, capacity
        for one request is enough: otherwise a slow slot would block the stream, and its checkpoints, for seconds.
        """
        if self._is_full or self.in_flight >= self._max_in_flight:
            with self._changed:
                self._wait_for(lambda: self.in_flight <= self._resume_at, timeout_s)
                self._is_full = self.in_flight >= self._max_in_flight
        self._require_alive()
        return not self._is_full

    def take(self, owner: int, timeout_s: float = 0.0) -> list[Answer]:
        """Collect the answers of `owner`. Waits for the first one for up to `timeout_s`."""
        if timeout_s <= 0 and owner not in self._finished:
            self._require_alive()
            return []
        with self._changed:
            if timeout_s > 0:
                self._wait_for(lambda: owner in self._finished, timeout_s)
            self._require_alive()
            finished = self._finished.pop(owner, [])
            if (retried := self._retried.get(owner)) is not None:
                for answer in finished:
                    retried.pop(answer.position, None)
            self._outstanding[owner] -= len(finished)
        now_ms = self._clock.wall_ms()
        return [answer.leaving(now_ms) for answer in finished]

    def retried(self, owner: int) -> list[Envelope]:
        """Outstanding requests of `owner` that were retried since the last call, with their number of attempts."""
        if owner not in self._retried:
            return []
        with self._changed:
            return list(self._retried.pop(owner).values())

    def close(self) -> None:
        """End the slot after its current step. Requests without an answer get none."""
        self._slot.end()
        self._thread.join()

    def _receive(self) -> None:
        try:
            while True:
                came = self._slot.receive()
                with self._changed:
                    for one in came:
                        if isinstance(one, Answer):
                            self._finished[self._owners.pop(one.position)].append(one)
                        else:
                            self._retried[self._owners[one.envelope.position]][one.envelope.position] = one.envelope
                    if self._awaited():
                        self._changed.notify_all()
        except BaseException as error:  # raised again in the calling thread
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _wait_for(self, awaited: Callable[[], object], timeout_s: float) -> None:
        """Wait until `awaited` holds or the slot has failed. The lock must be held."""
        self._awaited = awaited
        self._changed.wait_for(lambda: self._error or awaited(), timeout_s)
        self._awaited = lambda: False

    def _require_alive(self) -> None:
        if self._error is not None:
            raise RuntimeError(f"the slot failed: {self._error}") from self._error

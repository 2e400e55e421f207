"""Continuous batching beside a stream: the slot's process steps while requests come and go here.

The stream's side hands requests in without waiting and takes out what has finished. The process takes in what has come
between two steps, so that a request joins the running batch one step after its arrival.
"""

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Protocol

from core.clock import Clock
from operators.envelope import Answer, Envelope, RecordPosition
from operators.slots.retry_tracker import Retry


class Serving(Protocol):
    """A slot that steps by itself; another thread may receive than sends."""

    def send(self, order: Envelope) -> None: ...

    def receive(self) -> list[Answer | Retry]:
        """What has finished or is asked again; waits for it, and raises once the slot has ended."""
        ...

    def end(self) -> None:
        """End the slot, soon."""
        ...


class Pump:
    """Keeps a slot's owners apart: each takes out only what it has handed in.

    All calls come from one thread. If the slot fails, every call raises `RuntimeError`.
    """

    def __init__(self, slot: Serving, max_in_flight: int, clock: Clock, rows: int = 1) -> None:
        """`rows`: sequences that the slot runs together. It has at least as many requests while there are some."""
        self._slot = slot
        self._max_in_flight = max_in_flight
        # Room for one request at a time would make the stream and the slot wait for each other at each request.
        self._resume_at = max_in_flight - max(1, (max_in_flight - rows) // 2)
        self._is_full = False
        self._clock = clock
        self._changed = threading.Condition()
        self._awaited: Callable[[], object] = lambda: False
        """What the stream's side waits for. It is not woken for anything else: each wake-up costs a thread switch."""
        self._finished: dict[int, list[Answer]] = defaultdict(list)
        self._retried: dict[int, dict[RecordPosition, Envelope]] = defaultdict(dict)
        self._owners: dict[RecordPosition, int] = {}
        """Owner of each request in the slot."""
        self._outstanding: dict[int, int] = defaultdict(int)
        """For each owner, what it has handed in and not taken out."""
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._receive, name="answers", daemon=True)
        self._thread.start()

    def submit(self, owner: int, envelope: Envelope) -> None:
        """Hand a request in; does not wait for the engine."""
        with self._changed:
            self._require_alive()
            self._owners[envelope.position] = owner
            self._outstanding[owner] += 1
        self._slot.send(envelope)

    @property
    def in_flight(self) -> int:
        """Requests of all owners that the slot has not answered yet."""
        return len(self._owners)

    def outstanding(self, owner: int) -> int:
        """Requests of `owner` that it has not taken out yet."""
        return self._outstanding[owner]

    def wait_for_room(self, timeout_s: float) -> bool:
        """Whether there is room for one more request, within `timeout_s`.

        Once the slot is full, this waits until half of the queued requests are answered. After `timeout_s`, room for
        one is enough: a slow slot would otherwise hold the stream, and its checkpoints, for seconds.
        """
        if self._is_full or self.in_flight >= self._max_in_flight:
            with self._changed:
                self._wait_for(lambda: self.in_flight <= self._resume_at, timeout_s)
                self._is_full = self.in_flight >= self._max_in_flight
        self._require_alive()
        return not self._is_full

    def take(self, owner: int, timeout_s: float = 0.0) -> list[Answer]:
        """What has finished of `owner`'s and leaves now; waits for a first one up to `timeout_s`."""
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
        """End the slot after the step it is in. What is unanswered stays so."""
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
        except BaseException as error:  # it is raised again where the stream calls
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

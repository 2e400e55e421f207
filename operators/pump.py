"""Continuous batching beside a stream: the engine steps in a thread of its own while requests come and go.

The stream's side hands requests in without waiting and takes out what has finished. The thread takes in what has come
between two steps, so that a request joins the running batch one step after its arrival.
"""

import threading
from collections import defaultdict
from dataclasses import dataclass

import torch

from core.records import DeadLetter, Response
from operators.envelope import Envelope
from operators.slot import Finished, InferenceSlot


@dataclass(frozen=True)
class Answer:
    """What leaves for one ticket."""

    ticket: str
    record: Response | DeadLetter


class Pump:
    """Runs a slot's engine. Owners keep their answers apart: each takes out only what it has handed in.

    All calls but those of the thread itself come from one other thread. If the engine raises, every call does.
    """

    def __init__(self, slot: InferenceSlot, max_in_flight: int) -> None:
        self._slot = slot
        self._max_in_flight = max_in_flight
        self._changed = threading.Condition()
        self._inbox: list[Envelope] = []
        self._finished: dict[int, list[Finished]] = defaultdict(list)
        self._owners: dict[int, tuple[int, str]] = {}
        """Owner and ticket of what is in the engine or finished, by the identity of its envelope."""
        self._outstanding: dict[int, int] = defaultdict(int)
        """For each owner, what it has handed in and not taken out."""
        self._in_engine = 0
        self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, owner: int, ticket: str, envelope: Envelope) -> None:
        """Hand a request in; does not wait."""
        with self._changed:
            self._require_alive()
            self._owners[id(envelope)] = (owner, ticket)
            self._outstanding[owner] += 1
            self._in_engine += 1
            self._inbox.append(envelope)
            self._changed.notify_all()

    def outstanding(self, owner: int) -> int:
        """Requests of `owner` that it has not taken out yet."""
        return self._outstanding[owner]

    def wait_for_room(self, timeout_s: float) -> bool:
        """Whether fewer than the most allowed are unanswered, within `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._in_engine < self._max_in_flight or self._error is not None, timeout_s)
            self._require_alive()
            return self._in_engine < self._max_in_flight

    def take(self, owner: int, timeout_s: float = 0.0) -> list[Answer]:
        """What has finished of `owner`'s; waits for a first one up to `timeout_s`."""
        with self._changed:
            if timeout_s > 0:
                self._changed.wait_for(lambda: self._finished[owner] or self._error is not None, timeout_s)
            self._require_alive()
            finished = self._finished.pop(owner, [])
            self._outstanding[owner] -= len(finished)
            tickets = [self._owners.pop(id(one.envelope))[1] for one in finished]
        return [Answer(ticket, self._slot.written(one)) for ticket, one in zip(tickets, finished, strict=True)]

    def close(self) -> None:
        """End the thread after the step it is in. What is unanswered stays so."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._slot.threads)
        try:
            while self._next_arrivals():
                self._finish(self._slot.step())
        except BaseException as error:  # it is raised again where the stream calls
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next_arrivals(self) -> bool:
        """Take in what has come; wait where there is nothing to do. False once the pump is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._slot.unfinished or self._closing)
            if self._closing:
                return False
            arrived, self._inbox = self._inbox, []
        self._finish([refused for one in arrived if (refused := self._slot.submit(one)) is not None])
        return True

    def _finish(self, finished: list[Finished]) -> None:
        if not finished:
            return
        with self._changed:
            for one in finished:
                self._finished[self._owners[id(one.envelope)][0]].append(one)
            self._in_engine -= len(finished)
            self._changed.notify_all()

    def _require_alive(self) -> None:
        if self._error is not None:
            raise RuntimeError("the engine failed") from self._error

"""Tracks the unanswered requests of a slot, and retries them when the slot's process dies.

Requests that were running when the process died are suspects, and are retried one at a time. A request that kills the
process again is thereby identified, and the others are answered. Requests that had not begun follow after the suspects.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from inference_service.completion import timed_out
from operators.envelope import Answer, Envelope, QueueState, RecordPosition


@dataclass(frozen=True)
class Retry:
    """A request is retried. Its envelope counts one more attempt."""

    envelope: Envelope


class RetryTracker:
    """Each request that `take` adds leaves exactly once: by `answered`, or as an `Answer` that a method returns."""

    def __init__(self, max_attempts: int, timeout_ms: float) -> None:
        """`timeout_ms`: maximum time since decoding, for requests that the process does not have. 0: no limit."""
        self._max_attempts = max_attempts
        self._timeout_ms = timeout_ms
        self._waiting: deque[Envelope] = deque()
        self._suspects: deque[Envelope] = deque()
        self._given: dict[RecordPosition, Envelope] = {}
        """The requests that the process has, in the order in which they were sent."""
        self._begun: set[RecordPosition] = set()
        self._alone = False
        """True while the process has one suspect, which no other request may join."""

    def __len__(self) -> int:
        return len(self._waiting) + len(self._suspects) + len(self._given)

    @property
    def queue(self) -> QueueState:
        return QueueState(len(self), len(self) - len(self._begun))

    @property
    def waiting_since_ms(self) -> float | None:
        """Time at which the oldest request that has not begun was decoded. None if all have begun."""
        given = [envelope for position, envelope in self._given.items() if position not in self._begun]
        waiting = [*self._waiting, *self._suspects, *given]
        return min((envelope.decoded_at_ms for envelope in waiting), default=None)

    def take(self, envelope: Envelope) -> None:
        """Add a request. It is a suspect if a process has died with it before."""
        (self._suspects if envelope.attempts else self._waiting).append(envelope)

    def give(self) -> list[Envelope]:
        """The requests to send to the process now: all that wait, or one suspect."""
        if self._given and (self._alone or self._suspects):
            return []
        self._alone = bool(self._suspects)
        orders = [self._suspects.popleft()] if self._alone else list(self._waiting)
        if not self._alone:
            self._waiting.clear()
        self._given.update((envelope.position, envelope) for envelope in orders)
        return orders

    def began(self, positions: Iterable[RecordPosition]) -> None:
        """The process has begun to compute these requests."""
        self._begun.update(positions)

    def answered(self, position: RecordPosition) -> None:
        self._begun.discard(position)
        del self._given[position]

    def lost(self, how: str) -> list[Answer | Retry]:
        """The process has died, as `how` describes. Return retries, and dead letters of requests without attempts left.

        A suspect that was alone in the process has used an attempt, even if it had not begun. If nothing had begun, all
        requests that were sent become suspects, because a prompt can kill the process before it begins. That does not
        count as an attempt.
        """
        came: list[Answer | Retry] = []
        innocent: list[Envelope] = []
        for envelope in self._given.values():
            if self._alone or envelope.position in self._begun:
                came.append(self._tried(envelope, how))
            elif self._begun:
                innocent.append(envelope)
            else:
                self._suspects.append(envelope)
        self._waiting.extendleft(reversed(innocent))
        self._given.clear()
        self._begun.clear()
        self._alone = False
        return came

    def expire(self, now_ms: float) -> list[Answer]:
        """Remove the requests that have waited for too long. The engine does this for those that the process has."""
        if not self._timeout_ms or not (self._waiting or self._suspects):
            return []
        return [*self._expired(self._waiting, now_ms), *self._expired(self._suspects, now_ms)]

    def _tried(self, envelope: Envelope, how: str) -> Answer | Retry:
        tried = replace(envelope, attempts=envelope.attempts + 1)
        if tried.attempts < self._max_attempts:
            self._suspects.append(tried)
            return Retry(tried)
        times = "once" if tried.attempts == 1 else f"{tried.attempts} times"
        return tried.unanswered(f"the slot's process died {times} while it worked on this request: {how}")

    def _expired(self, held: deque[Envelope], now_ms: float) -> Iterator[Answer]:
        for envelope in [one for one in held if now_ms - one.decoded_at_ms >= self._timeout_ms]:
            held.remove(envelope)
            yield envelope.unanswered(timed_out(self._timeout_ms))

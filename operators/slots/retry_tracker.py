"""What a slot has been given and has not answered, and what becomes of it when the slot's process dies.

What had begun in the process is suspect of its death, and is asked again alone: the innocent are answered, and whoever
it dies of again is known. What had not begun follows after them.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from inference_service.completion import timed_out
from operators.envelope import Answer, Envelope, Queue, RecordPosition


@dataclass(frozen=True)
class Retry:
    """A request is asked again: its envelope now says one attempt more."""

    envelope: Envelope


class RetryTracker:
    """Each request that is taken in leaves once: with `answered`, or by an `Answer` that a method returns."""

    def __init__(self, max_attempts: int, timeout_ms: float) -> None:
        """`timeout_ms` is of what the process does not have, since it was decoded; 0: none."""
        self._max_attempts = max_attempts
        self._timeout_ms = timeout_ms
        self._waiting: deque[Envelope] = deque()
        self._suspects: deque[Envelope] = deque()
        self._given: dict[RecordPosition, Envelope] = {}
        """What the process has, in order."""
        self._begun: set[RecordPosition] = set()
        self._alone = False
        """Whether what the process has is a suspect, that nothing may join."""

    def __len__(self) -> int:
        return len(self._waiting) + len(self._suspects) + len(self._given)

    @property
    def queue(self) -> Queue:
        return Queue(len(self), len(self) - len(self._begun))

    @property
    def waiting_since_ms(self) -> float | None:
        """When the first of those was decoded that have not begun; none if all have."""
        given = [envelope for position, envelope in self._given.items() if position not in self._begun]
        waiting = [*self._waiting, *self._suspects, *given]
        return min((envelope.decoded_at_ms for envelope in waiting), default=None)

    def take(self, envelope: Envelope) -> None:
        """Take a request in. It is a suspect if processes have died with it before."""
        (self._suspects if envelope.attempts else self._waiting).append(envelope)

    def give(self) -> list[Envelope]:
        """What the process is to have now, beside what it has: all that waits, or one suspect."""
        if self._given and (self._alone or self._suspects):
            return []
        self._alone = bool(self._suspects)
        orders = [self._suspects.popleft()] if self._alone else list(self._waiting)
        if not self._alone:
            self._waiting.clear()
        self._given.update((envelope.position, envelope) for envelope in orders)
        return orders

    def began(self, positions: Iterable[RecordPosition]) -> None:
        """The process has begun to work on them."""
        self._begun.update(positions)

    def answered(self, position: RecordPosition) -> None:
        self._begun.discard(position)
        del self._given[position]

    def lost(self, how: str) -> list[Answer | Retry]:
        """The process has died, in a way that `how` tells: who is asked again one attempt later, and who is not.

        One that was alone in it has used an attempt, begun or not. Where nothing had begun, what was given is suspect,
        as a prompt may kill before that, but has used none.
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
        """Let go of what the process does not have and that has waited for too long; the engine does so by itself."""
        if not self._timeout_ms or not (self._waiting or self._suspects):
            return []
        return [*self._expired(self._waiting, now_ms), *self._expired(self._suspects, now_ms)]

    def _tried(self, envelope: Envelope, how: str) -> Answer | Retry:
        tried = replace(envelope, attempts=envelope.attempts + 1)
        if tried.attempts < self._max_attempts:
            self._suspects.append(tried)
            return Retry(tried)
        times = "once" if tried.attempts == 1 else f"{tried.attempts} times"
        return tried.unanswered(f"the slot's process died {times} in the midst of it: {how}")

    def _expired(self, held: deque[Envelope], now_ms: float) -> Iterator[Answer]:
        for envelope in [one for one in held if now_ms - one.decoded_at_ms >= self._timeout_ms]:
            held.remove(envelope)
            yield envelope.unanswered(timed_out(self._timeout_ms))

"""Timers as Flink keeps them: one for each key, time and kind of time, in the order of their times."""

from collections.abc import Iterable
from dataclasses import dataclass

from pyflink.datastream import TimeDomain, TimerService

from core.clock import Clock
from tests.operators.flink.keyed_state import KeyedState

BEFORE_ALL_TIME = -(2**63)


@dataclass(frozen=True)
class Timer:
    """A timer at `timestamp`, in ms of processing time or of event time."""

    timestamp: int
    key: int
    domain: TimeDomain


class Timers(TimerService):
    """The timers that have not fired. A function sees those of its current key.

    Timers of the same time fire in the order of setting; Flink guarantees no order.
    """

    def __init__(self, clock: Clock, state: KeyedState, pending: Iterable[Timer]) -> None:
        self._clock = clock
        self._state = state
        self._pending = dict.fromkeys(pending)
        self._watermark = BEFORE_ALL_TIME
        self.on_their_way: list[Timer] = []
        """Set since `depart` was called: Java hears of them later, and a checkpoint may come before."""

    # For the harness.

    def pending(self, domain: TimeDomain) -> list[Timer]:
        """Pending timers, the next one first."""
        return sorted((timer for timer in self._pending if timer.domain is domain), key=lambda timer: timer.timestamp)

    def take_due(self, domain: TimeDomain, until: float) -> list[Timer]:
        """Remove and return the timers due at that time; later sets and deletes do not affect them."""
        due = [timer for timer in self.pending(domain) if timer.timestamp <= until]
        for timer in due:
            del self._pending[timer]
        return due

    def take(self, timer: Timer) -> None:
        del self._pending[timer]

    def advance_watermark(self, to_ms: int) -> None:
        self._watermark = max(self._watermark, to_ms)

    def depart(self) -> None:
        self.on_their_way = []

    # For the function.

    def current_processing_time(self) -> int:
        return int(self._clock.wall_ms())

    def current_watermark(self) -> int:
        return self._watermark

    def register_processing_time_timer(self, timestamp: int) -> None:
        self._set(self._timer(timestamp, TimeDomain.PROCESSING_TIME))

    def register_event_time_timer(self, timestamp: int) -> None:
        self._set(self._timer(timestamp, TimeDomain.EVENT_TIME))

    def delete_processing_time_timer(self, timestamp: int) -> None:
        self._pending.pop(self._timer(timestamp, TimeDomain.PROCESSING_TIME), None)

    def delete_event_time_timer(self, timestamp: int) -> None:
        self._pending.pop(self._timer(timestamp, TimeDomain.EVENT_TIME), None)

    def _set(self, timer: Timer) -> None:
        if timer not in self._pending:
            self._pending[timer] = None
            self.on_their_way.append(timer)

    def _timer(self, timestamp: int, domain: TimeDomain) -> Timer:
        if self._state.current_key is None:
            raise TypeError("timers are only supported on a keyed stream")
        if not isinstance(timestamp, int):
            raise TypeError(f"a timer's time is a whole number of milliseconds, not {timestamp!r}")
        return Timer(timestamp, self._state.current_key, domain)

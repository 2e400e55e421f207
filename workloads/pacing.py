"""When requests leave: an open loop on the workload's own schedule, or as fast as they can be sent.

An open loop does not slow down with the system under test. A request's `created_at_ms` is the time it was *due*, so
that the time it spent waiting for a late sender is part of its latency, and not left out ("coordinated omission").
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from core.clock import Clock

Wait = Callable[[float], bool]
"""Waits for so many milliseconds; returns early, and true, when the load is to stop."""

LATE_MS = 10.0
"""A send is late from this lag on; below it lies what a timer and a scheduler take."""


@dataclass
class Lag:
    """How far sends were behind their schedule."""

    sends: int = 0
    late: int = 0
    total_ms: float = 0.0
    max_ms: float = 0.0

    def add(self, lag_ms: float) -> None:
        self.sends += 1
        self.late += lag_ms >= LATE_MS
        self.total_ms += lag_ms
        self.max_ms = max(self.max_ms, lag_ms)

    @property
    def mean_ms(self) -> float:
        return self.total_ms / self.sends if self.sends else 0.0


class Pace(Protocol):
    lag: Lag

    def begin(self) -> None:
        """The load begins now: `at_ms` counts from here."""
        ...

    def due(self, at_ms: float) -> float | None:
        """Return when the request may leave, with its `created_at_ms` (Unix); none when the load is to stop."""
        ...


class OpenLoop:
    """Each request leaves `at_ms` after the beginning, or at once where that has passed already.

    Waits go by the monotonic clock; `created_at_ms` is the wall time of the beginning plus `at_ms`, so that a wall
    clock that is set while the load runs does not bend the schedule.
    """

    def __init__(self, clock: Clock, wait: Wait) -> None:
        self._clock = clock
        self._wait = wait
        self._began_ms = self._began_wall_ms = 0.0
        self.lag = Lag()

    def begin(self) -> None:
        self._began_ms = self._clock.monotonic_ms()
        self._began_wall_ms = self._clock.wall_ms()
        self.lag = Lag()

    def due(self, at_ms: float) -> float | None:
        due_ms = self._began_ms + at_ms
        # Once for a stop that came while nothing was to be waited for, then until a wait has not returned early.
        remaining_ms = max(0.0, due_ms - self._clock.monotonic_ms())
        while True:
            if self._wait(remaining_ms):
                return None
            remaining_ms = due_ms - self._clock.monotonic_ms()
            if remaining_ms <= 0:
                break
        self.lag.add(-remaining_ms)
        return self._began_wall_ms + at_ms


class Backlog:
    """Every request leaves at once and is created when it leaves: for a load that stands ready as a backlog."""

    def __init__(self, clock: Clock, wait: Wait) -> None:
        self._clock = clock
        self._wait = wait
        self.lag = Lag()

    def begin(self) -> None:
        self.lag = Lag()

    def due(self, at_ms: float) -> float | None:
        return None if self._wait(0.0) else self._clock.wall_ms()

"""When requests are sent: on the workload's schedule (open loop), or as fast as possible (backlog).

An open loop does not slow down with the system under test. A request's `created_at_ms` is the time when it was *due*.
So its latency includes the delay of a late sender; leaving that out would be "coordinated omission".
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from core.clock import Clock

Wait = Callable[[float], bool]
"""Waits for the given number of milliseconds; returns early with true if the load is to stop."""

LATE_MS = 10.0
"""A send is late from this lag on; timers and schedulers cause smaller ones."""


@dataclass
class Lag:
    """Delays of sends against their schedule."""

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
        """Start the load: `at_ms` counts from now."""
        ...

    def due(self, at_ms: float) -> float | None:
        """Wait until the request may be sent; return its `created_at_ms` (Unix), or none if the load is to stop."""
        ...


class OpenLoop:
    """Sends each request `at_ms` after the start, or at once if that time has passed.

    Waits use the monotonic clock. `created_at_ms` is the wall time of the start plus `at_ms`, so setting the wall clock
    during the load does not change the schedule.
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
        # Wait at least once, to see a stop that came when no wait was due; then until a wait has lasted to its end.
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
    """Sends every request at once; `created_at_ms` is the time of sending."""

    def __init__(self, clock: Clock, wait: Wait) -> None:
        self._clock = clock
        self._wait = wait
        self.lag = Lag()

    def begin(self) -> None:
        self.lag = Lag()

    def due(self, at_ms: float) -> float | None:
        return None if self._wait(0.0) else self._clock.wall_ms()

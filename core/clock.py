"""Clocks, so that time is an argument: the system's clock, or one that a test moves."""

import time
from typing import Protocol


class Clock(Protocol):
    def wall_ms(self) -> float:
        """Milliseconds since the Unix epoch. Comparable between processes; may jump."""
        ...

    def monotonic_ms(self) -> float:
        """Milliseconds since an arbitrary start, for durations and deadlines. Never decreases."""
        ...


class SystemClock:
    def wall_ms(self) -> float:
        return time.time_ns() / 1e6

    def monotonic_ms(self) -> float:
        return time.monotonic_ns() / 1e6


class ManualClock:
    """A clock that only moves when `advance` is called."""

    def __init__(self, now_ms: float = 0.0) -> None:
        self._now_ms = now_ms

    def wall_ms(self) -> float:
        return self._now_ms

    def monotonic_ms(self) -> float:
        return self._now_ms

    def advance(self, by_ms: float) -> None:
        self._now_ms += by_ms

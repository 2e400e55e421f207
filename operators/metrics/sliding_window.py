"""Percentiles of the latest values of a stream."""

from collections import deque

import numpy as np

from core.clock import Clock

SPAN_MS = 300_000.0
MOST = 2048
"""Maximum number of values that are kept. Beyond it, the oldest are dropped."""
PERCENTS = (50, 95, 99)
_FRESH_MS = 1000.0
"""Minimum time between two computations of percentiles."""


class SlidingWindow:
    """The values of the last `SPAN_MS`, at most `MOST` of them. Any thread may read."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._values: deque[tuple[float, float]] = deque(maxlen=MOST)
        self._percentiles = {percent: float("nan") for percent in PERCENTS}
        self._due_ms = 0.0

    def add(self, value: float, now_ms: float) -> None:
        """`now_ms`: monotonic, by the same clock."""
        self._values.append((now_ms, value))

    def percentile(self, percent: int) -> float:
        """The percentile `percent` (one of `PERCENTS`), by linear interpolation. NaN without values."""
        now_ms = self._clock.monotonic_ms()
        if now_ms >= self._due_ms:
            self._due_ms = now_ms + _FRESH_MS
            recent = [value for at_ms, value in tuple(self._values) if now_ms - at_ms < SPAN_MS]
            found = np.percentile(recent, PERCENTS) if recent else [float("nan")] * len(PERCENTS)
            self._percentiles = dict(zip(PERCENTS, map(float, found), strict=True))
        return self._percentiles[percent]

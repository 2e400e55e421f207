"""FLUID: the capacity follows the request rate."""

import math
from collections import deque
from collections.abc import Sequence

from cache.config import SizingConfig
from cache.sizing.protocol import clamp

LEAST_SPAN_MS = 1000.0
"""Minimum time span of a rate: two requests within 1 ms are not a rate of 2,000 per second."""


class Fluid:
    """Compares the recent request rate with its long-run average. Grows above the average and shrinks below it.

    It decides at every `adjust_every_requests`-th request. `rate` is the number of requests in the last
    `fluid_window_ms` over the time that they span. It is compared with the average `h`, which is then updated:
    `h = w h + (1 - w) rate`. The first decision only sets `h`. The policy stores one number per request in the window.
    """

    def __init__(self, config: SizingConfig) -> None:
        self._config = config
        self._arrivals_ms: deque[float] = deque()
        self._requests = 0
        self._average_rate: float | None = None
        self.capacity_chunks = clamp(config.capacity_chunks, config)

    def observe(self, now_ms: float, keys: Sequence[bytes]) -> int:
        self._arrivals_ms.append(now_ms)
        while now_ms - self._arrivals_ms[0] > self._config.fluid_window_ms:
            self._arrivals_ms.popleft()
        self._requests += 1
        if self._requests % self._config.adjust_every_requests == 0:
            self._decide(self._rate_per_s())
        return self.capacity_chunks

    def _rate_per_s(self) -> float:
        span_ms = max(self._arrivals_ms[-1] - self._arrivals_ms[0], LEAST_SPAN_MS)
        return len(self._arrivals_ms) / span_ms * 1000.0

    def _decide(self, rate: float) -> None:
        config, average = self._config, self._average_rate
        if average is None:
            self._average_rate = rate
            return
        # Rounded away from the current value, so that a step changes a small capacity too.
        if rate > config.fluid_grow_above * average:
            self.capacity_chunks = clamp(math.ceil(self.capacity_chunks * config.fluid_grow_factor), config)
        elif rate < config.fluid_shrink_below * average:
            self.capacity_chunks = clamp(math.floor(self.capacity_chunks / config.fluid_shrink_factor), config)
        weight = config.fluid_history_weight
        self._average_rate = weight * average + (1 - weight) * rate

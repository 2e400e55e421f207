"""MRC: sets the capacity from a miss-ratio curve that is measured while the load runs."""

import math
from collections.abc import Sequence

import numpy as np

from cache.config import MrcGoal, SizingConfig
from cache.sizing.gain_curve import GainCurve
from cache.sizing.miss_ratio_curve import MissRatioCurve
from cache.sizing.protocol import clamp


class MRC:
    """At every `adjust_every_requests`-th request, moves the capacity towards the one that the recent curve asks for.

    With the goal `hit_rate` this is the smallest capacity that would have hit `mrc_target_hit_rate` of the recent
    accesses. It is corrected for the surplus or shortfall of hits so far, which the policy can compute: an LRU tier
    holds the top of the LRU stack, so its hits follow from its past capacities. With the goal `price`, or if no
    capacity reaches the target, it is the knee of the curve: beyond it one more chunk gains less than `mrc_price` hits
    per second.

    During the first `mrc_warmup_requests` the tier grows with the number of chunks looked up, so that almost nothing is
    evicted. The curve shows how much room these chunks need only after they are looked up again. After that, a decision
    changes the capacity by at most a fixed factor, and skips small changes. An increase never waits, because evicted
    chunks would be missed. A decrease waits for `mrc_dwell_ms` after the previous change.
    """

    def __init__(self, config: SizingConfig) -> None:
        self._config = config
        self._curve = MissRatioCurve(config.max_capacity_chunks, config.mrc_tracked_chunks)
        self._requests = 0
        self._resident = 0.0
        """How many keys from the top of the LRU stack an LRU tier with the policy's capacities holds."""
        self._owed = 0.0
        """Target hits minus actual hits so far. Old values fade."""
        self._moved_ms = -math.inf
        self.capacity_chunks = clamp(config.capacity_chunks, config)

    @property
    def tracked_chunks(self) -> int:
        """Number of tracked keys; at most `mrc_tracked_chunks`."""
        return len(self._curve)

    def observe(self, now_ms: float, keys: Sequence[bytes]) -> int:
        config = self._config
        depths = self._curve.look_up(now_ms, keys)
        self._requests += 1
        if self._requests % config.adjust_every_requests == 0:
            if self._requests > config.mrc_warmup_requests:
                self._move_towards(self._needed(), now_ms)
            self._age()
        self._admit(depths, len(keys))
        return self.capacity_chunks

    def observe_stored(self, keys: Sequence[bytes]) -> None:
        self._take_in(self._curve.put(keys))
        self._resident = min(self._resident, self.capacity_chunks)

    def _needed(self) -> int:
        """The capacity that reaches the goal on the current curve."""
        config, curve = self._config, self._curve
        if config.mrc_goal is MrcGoal.HIT_RATE:
            capacities = np.arange(config.min_capacity_chunks, config.max_capacity_chunks + 1)
            hits = curve.hits(capacities)
            enough = hits >= config.mrc_target_hit_rate * curve.accesses + config.mrc_catch_up * self._owed
            if enough.any():
                return int(capacities[np.argmax(enough)])
        return GainCurve.of(curve, config.max_capacity_chunks).knee(config.mrc_price)

    def _move_towards(self, needed: int, now_ms: float) -> None:
        config, capacity = self._config, self.capacity_chunks
        # Rounded away from the current value, so that a step changes a small capacity too.
        most = max(math.ceil(capacity * config.mrc_grow_factor), capacity + 1)
        least = math.floor(capacity / config.mrc_shrink_factor)
        aim = clamp(max(least, min(needed, most)), config)
        if abs(aim - capacity) <= config.mrc_hysteresis * capacity:
            return
        if aim < capacity and now_ms - self._moved_ms < config.mrc_dwell_ms:
            return
        self.capacity_chunks, self._moved_ms = aim, now_ms

    def _age(self) -> None:
        every = self._config.adjust_every_requests
        self._curve.age(0.5 ** (every / self._config.mrc_half_life_requests))
        self._owed *= 0.5 ** (every / self._config.mrc_horizon_requests)

    def _admit(self, depths: Sequence[float], accesses: int) -> None:
        """Follow what the tier does at this lookup: it hits keys that it holds, inserts the others, and evicts."""
        self._resident = min(self._resident, self.capacity_chunks)
        missed = self._take_in(depths)
        self._owed += self._config.mrc_target_hit_rate * accesses - (accesses - missed)
        if self._requests <= self._config.mrc_warmup_requests:
            self.capacity_chunks = clamp(max(self.capacity_chunks, math.ceil(self._resident)), self._config)
        self._resident = min(self._resident, self.capacity_chunks)

    def _take_in(self, depths: Sequence[float]) -> float:
        """Make the missing keys resident, and return how many there are."""
        missed = sum(depth > self._resident for depth in depths) / self._curve.rate
        self._resident += missed
        return missed

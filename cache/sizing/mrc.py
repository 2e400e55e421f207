"""MRC: the capacity that a miss-ratio curve, kept while the load runs, says is needed."""

import math
from collections.abc import Sequence

import numpy as np

from cache.config import MrcGoal, SizingConfig
from cache.sizing.gain_curve import GainCurve
from cache.sizing.miss_ratio_curve import MissRatioCurve
from cache.sizing.protocol import clamp


class MRC:
    """At every `adjust_every_requests`-th request the capacity moves towards what the curve of late says is needed.

    Goal `hit_rate`: the smallest capacity that would have hit `mrc_target_hit_rate` of the recent accesses, and what
    earlier ones are short of it or above it besides. The policy knows how many that are: a least-recently-used tier
    holds the top of the stack, so that its hits follow from the capacities that it was given. Where no capacity
    reaches that, and for the goal `price` always: the knee, beyond which another chunk gains less than
    `mrc_price` hits a second.

    In the first `mrc_warmup_requests` the tier grows with what is looked up, so that next to nothing leaves: how much
    room that needs is on no curve before it was looked up again. After that a decision moves the capacity by a bounded
    factor, and leaves it where it is about right. Growing never waits, as what has left is missed; shrinking waits for
    `mrc_dwell_ms` after a change.
    """

    def __init__(self, config: SizingConfig) -> None:
        self._config = config
        self._curve = MissRatioCurve(config.max_capacity_chunks, config.mrc_tracked_chunks)
        self._requests = 0
        self._resident = 0.0
        """Keys at the top of the stack that a least-recently-used tier of our capacities holds."""
        self._owed = 0.0
        """Hits that the accesses so far are short of the target by; aged."""
        self._moved_ms = -math.inf
        self.capacity_chunks = clamp(config.capacity_chunks, config)

    @property
    def tracked_chunks(self) -> int:
        """Keys that are remembered; never above `mrc_tracked_chunks`."""
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
        """The capacity that reaches the goal on the curve as it is now."""
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
        # Rounded away from where it stands, so that a step moves a small capacity too.
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
        """Follow what the tier does with this look-up: hits what it holds, takes in the rest, evicts the oldest."""
        self._resident = min(self._resident, self.capacity_chunks)
        missed = self._take_in(depths)
        self._owed += self._config.mrc_target_hit_rate * accesses - (accesses - missed)
        if self._requests <= self._config.mrc_warmup_requests:
            self.capacity_chunks = clamp(max(self.capacity_chunks, math.ceil(self._resident)), self._config)
        self._resident = min(self._resident, self.capacity_chunks)

    def _take_in(self, depths: Sequence[float]) -> float:
        """Make resident what was not; how much that is."""
        missed = sum(depth > self._resident for depth in depths) / self._curve.rate
        self._resident += missed
        return missed

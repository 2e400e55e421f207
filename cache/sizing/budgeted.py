"""MRC with a budget that several slots share: the capacity is the slot's share."""

from collections.abc import Sequence
from typing import Protocol

from cache.config import SizingConfig
from cache.sizing.budget import SlotReport
from cache.sizing.gain_curve import GainCurve
from cache.sizing.miss_ratio_curve import MissRatioCurve


class Shares(Protocol):
    """The connection to the other slots that share the budget."""

    @property
    def granted_chunks(self) -> int:
        """How many chunks this slot may hold now."""
        ...

    def offer(self, report: SlotReport) -> None:
        """Tell the other slots what more chunks would gain here. Does not block."""
        ...


class Budgeted:
    """Takes its capacity from `shares`. Reports its curve at every `adjust_every_requests`-th request."""

    def __init__(self, config: SizingConfig, shares: Shares) -> None:
        self._config = config
        self._shares = shares
        self._curve = MissRatioCurve(config.max_capacity_chunks, config.mrc_tracked_chunks)
        self._requests = 0
        self._gains = GainCurve(())
        self.capacity_chunks = shares.granted_chunks
        shares.offer(SlotReport(self._gains, self.capacity_chunks))

    def observe(self, now_ms: float, keys: Sequence[bytes]) -> int:
        config = self._config
        self._curve.look_up(now_ms, keys)
        self._requests += 1
        moved = self._shares.granted_chunks != self.capacity_chunks
        self.capacity_chunks = self._shares.granted_chunks
        if self._requests % config.adjust_every_requests == 0:
            self._gains = GainCurve.of(self._curve, config.max_capacity_chunks)
            self._curve.age(0.5 ** (config.adjust_every_requests / config.mrc_half_life_requests))
            moved = True
        if moved:
            self._shares.offer(SlotReport(self._gains, self.capacity_chunks))
        return self.capacity_chunks

    def observe_stored(self, keys: Sequence[bytes]) -> None:
        self._curve.put(keys)

"""Eviction policies: which chunk leaves a full local tier. They only order; the tier counts, pins and removes."""

from collections.abc import Callable

from cache.config import Eviction
from cache.eviction.arc import ARC
from cache.eviction.density import HitDensity
from cache.eviction.fifo import FIFO
from cache.eviction.leader import FollowTheLeader
from cache.eviction.lfu import LFU
from cache.eviction.lru import LRU
from cache.eviction.mq import MQ
from cache.eviction.protocol import EvictionPolicy

_POLICIES: dict[Eviction, Callable[[], EvictionPolicy]] = {
    Eviction.LRU: LRU,
    Eviction.FIFO: FIFO,
    Eviction.LFU: LFU,
    Eviction.ARC: ARC,
    Eviction.MQ: MQ,
    Eviction.DENSITY: HitDensity,
    # LRU first: where recency is all there is to know, nothing is lost on finding that out.
    Eviction.LEADER: lambda: FollowTheLeader(LRU(), HitDensity()),
}


def make_eviction(name: Eviction) -> EvictionPolicy:
    """A fresh, empty policy of that name."""
    return _POLICIES[name]()


__all__ = ["ARC", "FIFO", "LFU", "LRU", "MQ", "EvictionPolicy", "FollowTheLeader", "HitDensity", "make_eviction"]

"""Eviction policies: which chunk leaves a full local tier. They only order; the tier counts, pins and removes."""

from cache.eviction.lru import LRU
from cache.eviction.protocol import EvictionPolicy
from core.config import Eviction

_POLICIES: dict[Eviction, type[EvictionPolicy]] = {Eviction.LRU: LRU}


def make_eviction(name: Eviction) -> EvictionPolicy:
    """A fresh, empty policy of that name."""
    return _POLICIES[name]()


__all__ = ["LRU", "EvictionPolicy", "make_eviction"]

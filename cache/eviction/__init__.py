"""Eviction policies choose the chunk that leaves a full local tier. The tier itself counts, pins and removes chunks."""

from cache.eviction.protocol import EvictionPolicy
from cache.registry import EVICTION


def make_eviction(name: str) -> EvictionPolicy:
    """An empty policy of the registered `name`."""
    policy: EvictionPolicy = EVICTION.load(name)()
    return policy


__all__ = ["EvictionPolicy", "make_eviction"]

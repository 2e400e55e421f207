"""The policies of the local tier. A new policy needs its own file and one line here."""

from core.registry import Registry

EVICTION = Registry(
    {
        "LRU": "cache.eviction.lru:LRU",
        "FIFO": "cache.eviction.fifo:FIFO",
        "LFU": "cache.eviction.lfu:LFU",
        "ARC": "cache.eviction.arc:ARC",
        "MQ": "cache.eviction.mq:MQ",
        "DENSITY": "cache.eviction.density:HitDensity",
        "LEADER": "cache.eviction.leader:lru_or_density",
    }
)
"""Choose the chunk that leaves a full tier. Each entry makes an `EvictionPolicy` without arguments."""

SIZING = Registry(
    {
        "STATIC": "cache.sizing.static:Static",
        "FLUID": "cache.sizing.fluid:Fluid",
        "FREQUENCY": "cache.sizing.frequency:Frequency",
        "MRC": "cache.sizing.mrc:MRC",
    }
)
"""Set the capacity of the tier. Each entry makes a `SizingPolicy` from a `SizingConfig`."""

"""A two-level cache of key/value chunks: the local tier in the operator's process, Redis behind it.

`open_cache` makes one; `cache.protocol` says what it promises.
"""

from cache.manager import TwoLevelCache, open_cache
from cache.protocol import ChunkShape, KVCache, Lease, ModelIdentity
from cache.stats import CacheStats

__all__ = ["CacheStats", "ChunkShape", "KVCache", "Lease", "ModelIdentity", "TwoLevelCache", "open_cache"]

"""What a cache has done so far, and what it holds now."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheStats:
    """Counters since the cache was opened, then gauges. Without Redis those of Redis are zero."""

    lookups: int
    chunks_looked_up: int
    """Full chunks of the prompts that were looked up. Hit rates are relative to these."""
    local_chunks_hit: int
    remote_chunks_hit: int
    chunks_stored: int
    """Chunks that were copied from the engine to the local tier, or only to the queue to Redis."""
    chunks_refused: int
    """Chunks without room in the local tier: all chunks there were pinned, of the same prompt, or valued more by the
    eviction policy."""
    evictions: int

    remote_errors: int
    """Failed connections and error replies, of reads and writes."""
    remote_timeouts: int
    """Lookups that Redis did not answer within the deadline."""
    remote_corrupt: int
    """Records that were damaged, foreign, not finite or of another version. They count as misses and are deleted."""
    write_dropped: int
    """Chunks that were not written to Redis: the queue was full, Redis was unavailable, or the chunk was unfit."""
    write_unfit: int
    """Those of `write_dropped` that were not finite."""
    bytes_read: int
    """Bytes of complete records from Redis."""
    bytes_written: int
    """Bytes of complete records that Redis accepted."""

    capacity_chunks: int
    used_chunks: int
    pinned_chunks: int
    local_bytes: int
    """Tensors in the local tier, including those in flight."""
    pinned_outside_bytes: int
    """Tensors from Redis without room in the local tier. They live until their prefix is released."""
    fetched_bytes: int
    """Tensors from Redis that wait for their lookup, and those that are being read."""
    queued_bytes: int
    """Tensors that wait to be written to Redis. Most are in the local tier too."""

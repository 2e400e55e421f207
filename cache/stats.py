"""What a cache has done so far, and what it holds now."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheStats:
    """Counters since the cache was opened, then gauges. Without Redis those of Redis are zero."""

    lookups: int
    chunks_looked_up: int
    """Full chunks of the prompts that were looked up; hits of either tier are shares of these."""
    local_chunks_hit: int
    remote_chunks_hit: int
    chunks_stored: int
    """Chunks read from the engine and kept, in the local tier or only in the queue to Redis."""
    chunks_refused: int
    """Chunks that the local tier did not take: everything there was leased, of the same prompt, or worth more by the
    eviction policy."""
    evictions: int

    remote_errors: int
    """Faults of connections and replies, of reads and writes."""
    remote_timeouts: int
    """Look-ups that Redis did not answer within the deadline."""
    remote_corrupt: int
    """Records that were damaged, foreign, not finite or of another version; each was a miss, and its key is deleted."""
    write_dropped: int
    """Chunks that were not written to Redis: the queue was full, Redis away, or the chunk unfit."""
    write_unfit: int
    """Those of them that were not finite."""
    bytes_read: int
    """Whole records that came from Redis."""
    bytes_written: int
    """Whole records that Redis took."""

    capacity_chunks: int
    used_chunks: int
    pinned_chunks: int
    local_bytes: int
    """Tensors in the local tier, those in flight included."""
    pinned_outside_bytes: int
    """Tensors from Redis that found no room in the local tier and live as long as their prefix."""
    fetched_bytes: int
    """Tensors from Redis that wait for their look-up, and those that are being read."""
    queued_bytes: int
    """Tensors that wait to be written to Redis; most are in the local tier as well."""

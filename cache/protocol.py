"""The interface between an engine and a cache.

The engine does not know tiers, Redis or policies. The cache does not know models. They exchange token ids, chunks
(tensors of one fixed shape) and a `CachedPrefix`, which keeps the chunks in place while they are copied.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, Self

import torch


@dataclass(frozen=True)
class ChunkShape:
    """The tensor of one chunk: `[layers, 2, kv_heads, chunk_tokens, head_dim]`; index 1 is key (0) or value (1)."""

    layers: int
    kv_heads: int
    chunk_tokens: int
    head_dim: int
    dtype: torch.dtype

    @property
    def size(self) -> tuple[int, int, int, int, int]:
        return (self.layers, 2, self.kv_heads, self.chunk_tokens, self.head_dim)

    @property
    def size_bytes(self) -> int:
        layers, two, heads, tokens, dim = self.size
        return layers * two * heads * tokens * dim * self.dtype.itemsize


@dataclass(frozen=True)
class ModelIdentity:
    """Everything that must be equal for two processes to share chunks. It is part of every key.

    All fields are digests of content, or values. None is a name, which other weights could have too.
    """

    weights_digest: str
    tokenizer_digest: str
    settings: str
    """Other settings that affect what the weights compute (rope, activation, norms), as one canonical string."""
    adapter: str = ""


Tier = Literal["local", "remote"]


class CachedPrefix(Protocol):
    """The reusable prefix of one prompt. Until `release`, its chunks are neither evicted nor overwritten."""

    chunks: Sequence[torch.Tensor]
    """`chunks[i]` holds tokens `[i * chunk_tokens, (i + 1) * chunk_tokens)`, on the CPU. They must not be written to:
    copy them, then call `release`."""
    tiers: Sequence[Tier]
    """For each of `chunks`, the tier in which it was found."""
    local_chunks: int
    """How many of `chunks` were in the local tier."""
    remote_chunks: int
    """How many of `chunks` came from Redis."""
    capacity_chunks: int
    """Capacity of the local tier at the time of the lookup."""
    used_chunks: int
    """Chunks in the local tier at the time of the lookup."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def release(self) -> None:
        """Unpin the chunks. Idempotent."""
        ...


class Prefetch(Protocol):
    """A fetch of one prompt's chunks from Redis. Pass it to `KVCache.lookup`, or `cancel` it."""

    @property
    def ready(self) -> bool:
        """True once the fetch has ended, or the deadline since `KVCache.prefetch` has passed: look up now."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Return once it is `ready`, or after `timeout_s`."""
        ...

    def cancel(self) -> None:
        """Drop the chunks that have arrived and those that still will. Idempotent."""
        ...


class KVCache(Protocol):
    """A cache of full chunks of one model. `prefetch` and `lookup` never raise: a fault means a shorter prefix."""

    shape: ChunkShape

    def prefetch(
        self, token_ids: Sequence[int], salt: str = "", prefill_ms_per_token: float | None = None, priority: int = 0
    ) -> Prefetch | None:
        """Begin to fetch the chunks of `token_ids` that the local tier lacks from Redis. Does not block.

        `None`: there is nothing to fetch. `prefill_ms_per_token` is the engine's measurement: Redis is asked only if a
        transfer is predicted to be faster than the prefill. Prompts are fetched in the order of falling `priority`,
        then in the order of the calls.
        """
        ...

    def lookup(self, token_ids: Sequence[int], salt: str = "", prefetch: Prefetch | None = None) -> CachedPrefix:
        """The longest cached prefix of `token_ids`, in full chunks. It may cover the whole prompt.

        Uses the chunks that `prefetch` (of the same prompt and salt) has fetched so far, and ends it. Does not wait for
        Redis.
        """
        ...

    def store(self, token_ids: Sequence[int], read_chunk: Callable[[int, torch.Tensor], None], salt: str = "") -> int:
        """Store the full chunks of `token_ids` that the local tier lacks. Return how many were stored.

        `read_chunk(i, out)` must copy chunk `i` into `out` (of `shape`), and must not keep a reference to it. If it
        raises, that chunk is not stored, and the error is raised here.
        """
        ...

    def close(self, timeout_s: float = 5.0) -> None:
        """Write the queued chunks, as far as `timeout_s` allows, and end the background threads."""
        ...

"""What an engine may ask of a cache, and the shape of what passes between them.

The engine knows nothing of tiers, Redis or policies; the cache knows nothing of models. Between them pass token ids,
chunks (tensors of one fixed shape) and a `CachedPrefix`, which keeps the chunks in place while they are copied.
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
    """Everything that must be equal for two processes to share chunks; the root of every key.

    All fields are content digests or values, never names that other weights could carry too.
    """

    weights_digest: str
    tokenizer_digest: str
    settings: str
    """What else decides what the weights compute (rope type and base, activation, norms), as one canonical string."""
    adapter: str = ""


Tier = Literal["local", "remote"]


class CachedPrefix(Protocol):
    """The reusable prefix of one prompt. While it is held its chunks are neither evicted nor overwritten."""

    chunks: Sequence[torch.Tensor]
    """`chunks[i]` holds tokens `[i * chunk_tokens, (i + 1) * chunk_tokens)`: a contiguous prefix, on the CPU, not to be
    written to. Copy them, then call `release`."""
    tiers: Sequence[Tier]
    """For each of `chunks`, the tier it was found in."""
    local_chunks: int
    """How many of `chunks` the local tier held."""
    remote_chunks: int
    """How many of `chunks` came from Redis."""
    capacity_chunks: int
    """What the local tier might hold when this look-up was made."""
    used_chunks: int
    """What the local tier held when this look-up was made."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def release(self) -> None:
        """Let the chunks go. Idempotent."""
        ...


class Prefetch(Protocol):
    """Chunks of one prompt on their way from Redis. Give it to `KVCache.lookup`, or `cancel` it."""

    @property
    def ready(self) -> bool:
        """Whether to look up now: all has come that will, or the deadline since `KVCache.prefetch` has passed."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Return once it is `ready`, or after `timeout_s`."""
        ...

    def cancel(self) -> None:
        """Drop what has come and what still comes. Idempotent."""
        ...


class KVCache(Protocol):
    """A cache of full chunks of one model. Neither `prefetch` nor `lookup` raises: any fault is a shorter prefix."""

    shape: ChunkShape

    def prefetch(
        self, token_ids: Sequence[int], salt: str = "", prefill_ms_per_token: float | None = None, priority: int = 0
    ) -> Prefetch | None:
        """Begin to fetch from Redis what the local tier lacks of `token_ids`; does not block. `None`: nothing to fetch.

        `prefill_ms_per_token` is what the engine has measured; Redis is asked only where its transfer is predicted to
        be cheaper. A higher `priority` is fetched first, then what was asked for first.
        """
        ...

    def lookup(self, token_ids: Sequence[int], salt: str = "", prefetch: Prefetch | None = None) -> CachedPrefix:
        """The longest cached prefix of `token_ids`, in full chunks; may reach the very end of the prompt.

        Takes what `prefetch`, of the same prompt and salt, has brought by now and ends it. Does not wait for Redis.
        """
        ...

    def store(self, token_ids: Sequence[int], read_chunk: Callable[[int, torch.Tensor], None], salt: str = "") -> int:
        """Keep the full chunks of `token_ids` that the local tier lacks; the number newly kept.

        `read_chunk(i, out)` copies chunk `i` into `out` (of `shape`) and keeps no reference to it. If it raises,
        nothing of that chunk is visible afterwards and the error passes on.
        """
        ...

    def close(self, timeout_s: float = 5.0) -> None:
        """Write out what is queued, as far as `timeout_s` allows, and end the background thread."""
        ...

"""Loads for tests of sizing policies, and the results of a policy on them in a real cache."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from cache.config import SizingConfig
from cache.eviction.lru import LRU
from cache.keys import KeySchema
from cache.local import LocalTier
from cache.manager import TwoLevelCache
from cache.protocol import ChunkShape, ModelIdentity
from cache.sizing import SizingPolicy, StoreObserver, make_sizing
from cache.sizing.miss_ratio_curve import MissRatioCurve
from cache.stats import CacheStats
from core.clock import ManualClock
from workloads.bursts import bursts as made_bursts
from workloads.config import PhasesConfig, WorkloadConfig
from workloads.phases import PhasesWorkload

SHAPE = ChunkShape(layers=1, kv_heads=1, chunk_tokens=32, head_dim=0, dtype=torch.float32)
"""Chunks are empty, because a policy's decisions do not depend on their content."""
KEYS = KeySchema(ModelIdentity(weights_digest="w", tokenizer_digest="t", settings="s"), SHAPE)
Load = tuple[tuple[float, list[int]], ...]
"""`(ms since the begin, prompt)`."""


@lru_cache
def phases(requests: int, seed: int) -> Load:
    """The load of the cache experiments: users grow, crowd and leave."""
    config = WorkloadConfig(
        requests=requests,
        seed=seed,
        max_new_tokens=16,
        max_prompt_tokens=1024,
        phases=PhasesConfig(base_interval_ms=600.0),
    )
    return tuple((timed.at_ms, list((timed.prompt or "").encode())) for timed in PhasesWorkload(config))


@lru_cache
def bursts(requests: int, seed: int) -> Load:
    """Sessions in bursts. Each block of the load becomes its own tokens."""
    size = SHAPE.chunk_tokens
    return tuple(
        (request.at_ms, [block for block in request.blocks for _ in range(size)])
        for request in made_bursts(requests, seed)
    )


@dataclass(frozen=True)
class SizingResult:
    hit_rate: float
    """Hit rate over the chunks that were looked up."""
    mean_chunks: float
    """Chunk-seconds of capacity over the length of the load."""


class Metered:
    """A policy, and the integral of its capacity over time."""

    def __init__(self, policy: SizingPolicy) -> None:
        self._policy = policy
        self._at_ms: float | None = None
        self.chunk_ms = 0.0

    @property
    def capacity_chunks(self) -> int:
        return self._policy.capacity_chunks

    def observe(self, now_ms: float, keys: Sequence[bytes]) -> int:
        if self._at_ms is not None:
            self.chunk_ms += self.capacity_chunks * (now_ms - self._at_ms)
        self._at_ms = now_ms
        return self._policy.observe(now_ms, keys)

    def observe_stored(self, keys: Sequence[bytes]) -> None:
        if isinstance(self._policy, StoreObserver):
            self._policy.observe_stored(keys)


def replay(policy: SizingPolicy, load: Load, answer_tokens: int = 0) -> CacheStats:
    """Look up each prompt in a cache with the policy, and store it with an answer that is never looked up."""
    clock, dice = ManualClock(), random.Random(0)
    local = LocalTier(policy.capacity_chunks, SHAPE.size_bytes, LRU())
    cache = TwoLevelCache(shape=SHAPE, keys=KEYS, local=local, sizing=policy, remote=None, clock=clock)
    for at_ms, prompt in load:
        clock.advance(at_ms - clock.monotonic_ms())
        cache.lookup(prompt).release()
        cache.store([*prompt, *(dice.randrange(1 << 16) for _ in range(answer_tokens))], lambda index, out: None)
    return cache.stats()


def outcome(config: SizingConfig, load: Load, answer_tokens: int = 0) -> SizingResult:
    """The result of a policy on the load."""
    policy = Metered(make_sizing(config))
    stats = replay(policy, load, answer_tokens)
    return SizingResult(stats.local_chunks_hit / stats.chunks_looked_up, policy.chunk_ms / (load[-1][0] - load[0][0]))


class Hindsight:
    """For every fixed capacity, the hit rate over the whole load."""

    def __init__(self, load: Load) -> None:
        curve = MissRatioCurve(8192, 8192)
        self._depths: list[float] = []
        self._accesses = 0
        self.keys = [KEYS.of(prompt).hashes for _, prompt in load]
        for (at_ms, _), keys in zip(load, self.keys, strict=True):
            self._depths += [depth for depth in curve.look_up(at_ms, keys) if depth < math.inf]
            self._accesses += len(keys)
        self._depths.sort()

    @property
    def attainable(self) -> float:
        """The hit rate of a cache that keeps everything: all accesses except first uses."""
        return len(self._depths) / self._accesses

    def smallest(self, hit_rate: float) -> int:
        """The smallest fixed capacity that reaches `hit_rate`."""
        return int(self._depths[math.ceil(hit_rate * self._accesses - 1e-9) - 1])

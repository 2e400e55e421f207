"""Loads that sizing policies are judged on, and what a policy makes of them in a real cache on a clock that is moved."""

import math
import random
from dataclasses import dataclass
from functools import lru_cache

import torch

from cache.manager import open_cache
from cache.protocol import ChunkShape, ModelIdentity
from cache.sizing.miss_ratio_curve import MissRatioCurve
from core.clock import ManualClock
from core.config import CacheConfig, SizingConfig
from workloads.config import PhasesConfig, WorkloadConfig
from workloads.phases import PhasesWorkload

SHAPE = ChunkShape(layers=1, kv_heads=1, chunk_tokens=32, head_dim=0, dtype=torch.float32)
"""What a policy decides does not depend on what chunks hold: nothing."""
IDENTITY = ModelIdentity(weights_digest="w", tokenizer_digest="t", settings="s")
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
    """Sessions in bursts, as in BurstGPT (Wang et al., 2024): gamma gaps of a variation above one, on and off.

    A burst brings 8 requests a second of 30 sessions, for 20 s in the mean; between two it is 0.7 a second of 4.
    """
    dice = random.Random(seed)
    system = [1] * 256
    load: list[tuple[float, list[int]]] = []
    sessions: list[list[int]] = []
    at_s = left_s = 0.0
    on, begun = False, 0
    while len(load) < requests:
        if left_s <= 0:
            on = not on
            left_s = 2 + dice.expovariate(1 / (20 if on else 40))
        gap_s = dice.gammavariate(0.5, 2 / (8.0 if on else 0.7))
        at_s, left_s = at_s + gap_s, left_s - gap_s
        most = 30 if on else 4
        del sessions[:-most]
        if len(sessions) < most or dice.random() < 0.15:
            begun += 1
            sessions.append(_turns(dice, begun, dice.randint(3, 9)))
            del sessions[:-most]
            session = sessions[-1]
        else:
            session = dice.choice(sessions)
        session += _turns(dice, begun, dice.randint(1, 3))
        load.append((at_s * 1000, [*system, *session]))
        if len(session) > 60 * SHAPE.chunk_tokens:
            sessions.remove(session)
    return tuple(load)


def _turns(dice: random.Random, session: int, chunks: int) -> list[int]:
    return [session, *(dice.randrange(1 << 16) for _ in range(chunks * SHAPE.chunk_tokens - 1))]


@dataclass(frozen=True)
class Outcome:
    hit_rate: float
    """Of the chunks that were looked up."""
    mean_chunks: float
    """Chunk-seconds of capacity over the length of the load."""


def outcome(config: SizingConfig, load: Load) -> Outcome:
    """What the policy makes of the load: prompts looked up in a cache and stored in it, one after the other."""
    clock = ManualClock()
    cache = open_cache(CacheConfig(chunk_tokens=SHAPE.chunk_tokens, sizing=config), SHAPE, IDENTITY, clock)
    chunk_ms, before = 0.0, 0
    for at_ms, prompt in load:
        waited_ms = at_ms - clock.monotonic_ms()
        chunk_ms += before * waited_ms
        clock.advance(waited_ms)
        with cache.lookup(prompt) as lease:
            before = lease.capacity_chunks
        cache.store(prompt, lambda index, out: None)
    stats = cache.stats()
    return Outcome(stats.local_chunks_hit / stats.chunks_looked_up, chunk_ms / (load[-1][0] - load[0][0]))


class Hindsight:
    """Of every fixed capacity, the hit rate over the whole load."""

    def __init__(self, load: Load) -> None:
        cache = open_cache(CacheConfig(chunk_tokens=SHAPE.chunk_tokens), SHAPE, IDENTITY, ManualClock())
        curve = MissRatioCurve(8192, 8192)
        self._depths: list[float] = []
        self._accesses = 0
        self.keys = [cache._keys.of(prompt).hashes for _, prompt in load]
        for (at_ms, _), keys in zip(load, self.keys, strict=True):
            self._depths += [depth for depth in curve.look_up(at_ms, keys) if depth < math.inf]
            self._accesses += len(keys)
        self._depths.sort()

    @property
    def attainable(self) -> float:
        """The hit rate of a cache that holds everything: all but first uses."""
        return len(self._depths) / self._accesses

    def smallest(self, hit_rate: float) -> int:
        """The smallest fixed capacity that reaches `hit_rate`."""
        return int(self._depths[math.ceil(hit_rate * self._accesses - 1e-9) - 1])

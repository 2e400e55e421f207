"""One run of the policy lab: sends a load through the cache in virtual time and sums up the result."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from cache.eviction import EvictionPolicy
from cache.local import LocalTier
from cache.manager import TwoLevelCache
from cache.sizing import SizingPolicy
from core.clock import ManualClock
from experiments.lab.config import Drive
from experiments.lab.keys import BLOCK_SHAPE, BlockKeys, block_key
from workloads.block_trace import BlockRequest


@dataclass(frozen=True, slots=True)
class Served:
    """The result of one request."""

    at_ms: float
    capacity_chunks: int
    accesses: int
    hits: int
    """Number of its blocks that were resident."""
    prefix_hits: int
    """Number of its leading blocks that were resident, up to the first that was not."""
    tokens: int
    hit_tokens: int
    """Tokens of the blocks of `prefix_hits`."""


@dataclass
class ReplayResult:
    """Sums over one run."""

    requests: int = 0
    accesses: int = 0
    hits: int = 0
    prefix_hits: int = 0
    tokens: int = 0
    hit_tokens: int = 0
    peak_capacity_chunks: int = 0
    chunk_ms: float = 0.0
    """Integral of the capacity over virtual time, from the first request to the last."""
    span_ms: float = 0.0
    runtime_s: float = 0.0
    evictions: int = 0
    refused: int = 0
    """Blocks that were not admitted: all others were of the same prompt, or worth more."""
    last: Served | None = field(default=None, repr=False)

    def add(self, served: Served) -> None:
        if self.last is not None:
            passed_ms = served.at_ms - self.last.at_ms
            self.span_ms += passed_ms
            self.chunk_ms += passed_ms * self.last.capacity_chunks
        self.last = served
        self.requests += 1
        self.accesses += served.accesses
        self.hits += served.hits
        self.prefix_hits += served.prefix_hits
        self.tokens += served.tokens
        self.hit_tokens += served.hit_tokens
        self.peak_capacity_chunks = max(self.peak_capacity_chunks, served.capacity_chunks)

    @property
    def mean_capacity_chunks(self) -> float:
        """Mean capacity over virtual time; if all requests arrive at once, the last capacity."""
        if self.span_ms:
            return self.chunk_ms / self.span_ms
        return float(self.last.capacity_chunks) if self.last else 0.0


def run(
    load: Iterable[BlockRequest],
    eviction: EvictionPolicy,
    sizing: SizingPolicy,
    drive: Drive,
    watch: Callable[[Served], None] = lambda served: None,
) -> ReplayResult:
    """Serve the whole load; `watch` gets every request's result. The policies must be fresh."""
    outcome = ReplayResult()
    local = LocalTier(sizing.capacity_chunks, BLOCK_SHAPE.size_bytes, eviction)
    serve = _requests if drive is Drive.REQUEST else _accesses
    began_s = time.perf_counter()
    for served in serve(load, local, sizing, outcome):
        outcome.add(served)
        watch(served)
    outcome.runtime_s = time.perf_counter() - began_s
    outcome.evictions = local.evictions
    return outcome


def _requests(
    load: Iterable[BlockRequest], local: LocalTier, sizing: SizingPolicy, outcome: ReplayResult
) -> Iterator[Served]:
    """Use the cache manager: look up each prompt as a whole, release it, then store it."""
    clock = ManualClock()
    keys = BlockKeys()
    cache = TwoLevelCache(shape=BLOCK_SHAPE, keys=keys, local=local, sizing=sizing, remote=None, clock=clock)
    for request in load:
        clock.advance(request.at_ms - clock.monotonic_ms())
        with cache.lookup(request.blocks) as prefix:
            # Without Redis a lookup adds no chunk, so the chunks that are resident now were resident before it.
            hits = sum(key in local for key in keys.of(request.blocks).hashes)
            served = _served(request, prefix.capacity_chunks, hits, len(prefix.chunks))
        cache.store(request.blocks, _leave_empty)
        yield served
    outcome.refused = cache.stats().chunks_refused


def _accesses(
    load: Iterable[BlockRequest], local: LocalTier, sizing: SizingPolicy, outcome: ReplayResult
) -> Iterator[Served]:
    """Access block by block: a miss is stored before the next block. Sizing policies still see whole prompts."""
    content = torch.empty(BLOCK_SHAPE.size, dtype=BLOCK_SHAPE.dtype)
    for request in load:
        keys = [block_key(block) for block in request.blocks]
        local.resize(sizing.observe(request.at_ms, keys))
        hits = prefix_hits = 0
        for place, key in enumerate(keys):
            local.request((key,))
            if key in local:
                hits += 1
                prefix_hits += prefix_hits == place
            elif not local.put(key, content):
                outcome.refused += 1
        yield _served(request, local.capacity_chunks, hits, prefix_hits)


def _served(request: BlockRequest, capacity_chunks: int, hits: int, prefix_hits: int) -> Served:
    return Served(
        at_ms=request.at_ms,
        capacity_chunks=capacity_chunks,
        accesses=len(request.blocks),
        hits=hits,
        prefix_hits=prefix_hits,
        tokens=request.tokens,
        hit_tokens=min(prefix_hits * request.block_tokens, request.tokens),
    )


def _leave_empty(index: int, out: torch.Tensor) -> None:
    """A `read_chunk` that writes nothing, because blocks of a trace have no content."""

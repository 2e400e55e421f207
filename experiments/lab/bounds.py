"""Bounds that no policy can beat: an infinite cache, and the optimum that knows the future, both block by block."""

import heapq
import time
from array import array
from collections.abc import Iterable, Iterator

from experiments.lab.drive import ReplayResult, Served
from workloads.block_trace import BlockRequest

NEVER = (1 << 63) - 1


def infinite(load: Iterable[BlockRequest]) -> ReplayResult:
    """Run an infinite cache. Its capacity is the number of distinct blocks, from the beginning."""
    began_s = time.perf_counter()
    seen: set[int] = set()
    outcome = ReplayResult()
    for request in load:
        held = [_use(seen, block) for block in request.blocks]
        outcome.add(_served(request, held, 0))
    outcome.peak_capacity_chunks = len(seen)
    outcome.chunk_ms = outcome.span_ms * len(seen)
    outcome.runtime_s = time.perf_counter() - began_s
    return outcome


def belady(load: Iterable[BlockRequest], upcoming: "array[int]", capacity_chunks: int, *, bypass: bool) -> ReplayResult:
    """Run Belady's optimum (1966): it evicts the block whose next use is furthest away.

    With `bypass` this may be the new block, which is then not kept. Without `bypass` every block is admitted, as by
    most policies. `upcoming` is the result of `next_uses` for the same load. An access takes O(log capacity).
    """
    began_s = time.perf_counter()
    outcome = ReplayResult()
    held: dict[int, int] = {}
    """Position of the next use of each resident block."""
    furthest: list[tuple[int, int]] = []
    """A heap of (- next use, block), which may contain outdated entries."""
    place = 0

    def keep(block: int, next_use: int) -> None:
        held[block] = next_use
        heapq.heappush(furthest, (-next_use, block))
        if len(furthest) > 4 * capacity_chunks + 1024:
            furthest[:] = [(-use, kept) for kept, use in held.items()]
            heapq.heapify(furthest)

    for request in load:
        found = []
        for block in request.blocks:
            next_use = upcoming[place]
            place += 1
            is_hit = block in held
            found.append(is_hit)
            if is_hit or len(held) < capacity_chunks:
                keep(block, next_use)
                continue
            while furthest and held.get(furthest[0][1]) != -furthest[0][0]:
                heapq.heappop(furthest)
            if not furthest or (bypass and -furthest[0][0] <= next_use):
                outcome.refused += 1
                continue
            del held[heapq.heappop(furthest)[1]]
            outcome.evictions += 1
            keep(block, next_use)
        outcome.add(_served(request, found, capacity_chunks))
    outcome.runtime_s = time.perf_counter() - began_s
    return outcome


def next_uses(load: Iterable[BlockRequest]) -> "array[int]":
    """For each access in order, the position of the next access to the same block; `NEVER` if there is none."""
    upcoming = array("q")
    last: dict[int, int] = {}
    for place, block in enumerate(_accesses(load)):
        if block in last:
            upcoming[last[block]] = place
        last[block] = place
        upcoming.append(NEVER)
    return upcoming


def _accesses(load: Iterable[BlockRequest]) -> Iterator[int]:
    for request in load:
        yield from request.blocks


def _use(seen: set[int], block: int) -> bool:
    if block in seen:
        return True
    seen.add(block)
    return False


def _served(request: BlockRequest, found: list[bool], capacity_chunks: int) -> Served:
    prefix_hits = found.index(False) if False in found else len(found)
    return Served(
        at_ms=request.at_ms,
        capacity_chunks=capacity_chunks,
        accesses=len(found),
        hits=sum(found),
        prefix_hits=prefix_hits,
        tokens=request.tokens,
        hit_tokens=min(prefix_hits * request.block_tokens, request.tokens),
    )

"""The policy lab against an independent simulator, libcachesim, and minimum results of our policy on a trace."""

import os
import random
from pathlib import Path

import libcachesim
import pytest

from cache.config import SizingConfig
from cache.eviction import make_eviction
from cache.sizing import make_sizing
from experiments.lab import bounds
from experiments.lab.config import Drive
from experiments.lab.drive import ReplayResult, run
from experiments.lab.load import phases_blocks
from workloads.block_trace import BlockRequest, TraceFormat, read_blocks
from workloads.config import WorkloadConfig

TRACES = os.environ.get("INFERTUNER_TRACES")
"""Folder of real traces with their released names. Without it the tests use only a generated load."""
MADE_CAPACITIES = (10, 100, 400)
REAL_CAPACITIES = (100, 1000, 5000, 10_000)
PEERS = {"LRU": libcachesim.LRU, "FIFO": libcachesim.FIFO, "LFU": libcachesim.LFU}


def made_conversations(requests: int, seed: int) -> list[BlockRequest]:
    """Conversations that begin with block 0. Some continue after a while, when their users have read and typed."""
    draw = random.Random(seed)
    due: list[tuple[int, tuple[int, ...]]] = []
    fresh, made = 1, []
    for place in range(requests):
        ready = [one for one in due if one[0] <= place]
        blocks: tuple[int, ...] = (0,)
        if ready:
            due.remove(ready[0])
            blocks = ready[0][1]
        new = draw.randint(1, 3) if len(blocks) > 1 else draw.randint(2, 20)
        blocks = (*blocks, *range(fresh, fresh + new))
        fresh += new
        if draw.random() < (0.3 if len(blocks) <= 21 else 0.7):
            due.append((place + round(draw.lognormvariate(4.0, 0.7)), blocks))
        made.append(BlockRequest(100.0 * place, blocks, 512 * len(blocks), 512))
    return made


@pytest.fixture(scope="module", params=["made", "real"] if TRACES else ["made"])
def load(request: pytest.FixtureRequest) -> tuple[list[BlockRequest], tuple[int, ...]]:
    """Requests, and suitable capacities."""
    if request.param == "made":
        return made_conversations(3000, seed=1), MADE_CAPACITIES
    trace = Path(TRACES or "") / "mooncake_conversation_trace.jsonl"
    return list(read_blocks(trace, TraceFormat.MOONCAKE)), REAL_CAPACITIES


def served(load: list[BlockRequest], eviction: str, capacity: int, drive: Drive) -> ReplayResult:
    return run(load, make_eviction(eviction), make_sizing(SizingConfig(capacity_chunks=capacity)), drive)


def peer_hits(load: list[BlockRequest], eviction: str, capacity: int) -> int:
    cache = PEERS[eviction](cache_size=capacity, hashpower=16)
    access = libcachesim.Request()
    access.obj_size = 1
    hits = 0
    for request in load:
        for block in request.blocks:
            access.obj_id = block
            hits += cache.get(access)
    return hits


@pytest.mark.parametrize("eviction", PEERS)
def test_hits_equal_those_of_an_independent_simulator(load, eviction: str) -> None:
    requests, capacities = load
    ours = [served(requests, eviction, capacity, Drive.ACCESS).hits for capacity in capacities]
    assert ours == [peer_hits(requests, eviction, capacity) for capacity in capacities]


def test_the_optimum_is_above_every_policy(load) -> None:
    requests, capacities = load
    upcoming = bounds.next_uses(requests)
    for capacity in capacities:
        belady = bounds.belady(requests, upcoming, capacity, bypass=False).hits
        assert bounds.belady(requests, upcoming, capacity, bypass=True).hits >= belady
        assert all(belady >= peer_hits(requests, eviction, capacity) for eviction in PEERS)


def test_our_policies_are_not_below_lru_and_mq(load) -> None:
    requests, capacities = load
    names = ("LRU", "MQ", "DENSITY", "LEADER")
    for capacity in capacities:
        hits = {name: served(requests, name, capacity, Drive.REQUEST).prefix_hits for name in names}
        assert hits["DENSITY"] >= max(hits["LRU"], hits["MQ"])
        assert hits["LEADER"] >= hits["LRU"]
        # The cost of finding the better policy is a larger share of a short load.
        assert hits["LEADER"] >= 0.9 * hits["DENSITY"]


@pytest.mark.parametrize("capacity", [32, 64, 128, 256])
def test_the_leader_is_not_below_lru_where_recency_is_all(capacity: int) -> None:
    config = WorkloadConfig(requests=600, max_prompt_tokens=1024)
    requests = list(phases_blocks(config, chunk_tokens=32))
    ours, lru = (served(requests, one, capacity, Drive.REQUEST).prefix_hits for one in ("LEADER", "LRU"))
    assert ours >= lru > 0

"""A policy that is added by one file and one line in its registry works wherever its kind is used."""

import unittest
from collections.abc import Callable

import pytest
from cache_support import IDENTITY, SHAPE, given, hits, prompt, store
from eviction_contract import check_order_in_a_prompt, machine
from hypothesis import strategies as st
from sizing_contract import check_bounds, loads

from cache.manager import TwoLevelCache, open_cache
from cache.registry import EVICTION, SIZING
from core.clock import ManualClock
from core.options import Parser, add_options, from_options
from experiments import cache_experiments
from experiments.lab.config import LabConfig
from experiments.lab.load import make_load
from experiments.lab.table import rows
from operators.config import JobConfig

Register = Callable[..., None]

MOST_RECENT = '''
"""Most recently used: fits loads that read the same long range again and again."""

from cache.eviction.protocol import EvictionPolicy


class MostRecent(EvictionPolicy):
    """The chunk that was used last leaves first."""

    def __init__(self):
        self._oldest_first = {}

    def on_request(self, keys):
        for key in keys:
            if key in self._oldest_first:
                del self._oldest_first[key]
                self._oldest_first[key] = None

    def on_insert(self, key):
        self._oldest_first[key] = None

    def on_remove(self, key):
        del self._oldest_first[key]

    def victims(self):
        return reversed(self._oldest_first)
'''

LONGEST = '''
"""LONGEST: room for the longest prompts seen lately."""

from cache.sizing.protocol import clamp


class Longest:
    """Takes the greatest number of chunks in a prompt since the last decision."""

    def __init__(self, config):
        self._config = config
        self._lengths = []
        self.capacity_chunks = clamp(config.capacity_chunks, config)

    def observe(self, now_ms, keys):
        self._lengths.append(len(keys))
        if len(self._lengths) == self._config.adjust_every_requests:
            self.capacity_chunks = clamp(max(self._lengths), self._config)
            self._lengths.clear()
        return self.capacity_chunks
'''


@pytest.fixture
def most_recent(register: Register) -> str:
    register(EVICTION, "MOST_RECENT", "MostRecent", MOST_RECENT)
    return "MOST_RECENT"


@pytest.fixture
def longest(register: Register) -> str:
    register(SIZING, "LONGEST", "Longest", LONGEST)
    return "LONGEST"


def opened(*arguments: str) -> TwoLevelCache:
    """The cache of a job that is started with these options."""
    parser = Parser(prog="job")
    add_options(parser, JobConfig)
    job = from_options(JobConfig, parser.parse_args(["--chunk-tokens", str(SHAPE.chunk_tokens), *arguments]))
    return open_cache(job.cache, SHAPE, IDENTITY, ManualClock())


def test_an_added_eviction_policy_chooses_what_leaves_the_tier(most_recent: str) -> None:
    for eviction, kept in ((most_recent, [1, 0, 1]), ("LRU", [0, 1, 1])):
        cache = opened("--eviction", eviction, "--capacity-chunks", "2")
        for first in range(3):
            store(cache, prompt(1, first))
        assert [hits(cache, prompt(1, first))[0] for first in range(3)] == kept
        cache.close()


def test_an_added_eviction_policy_is_under_the_contract(most_recent: str) -> None:
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(machine(most_recent, examples=20)).run(result)
    assert result.testsRun == 1
    assert result.failures + result.errors == []


@given(length=st.integers(1, 8), capacity=st.integers(1, 8), times=st.integers(1, 3))
def test_an_added_eviction_policy_keeps_the_order_in_a_prompt(most_recent: str, length, capacity, times) -> None:
    check_order_in_a_prompt(most_recent, length, capacity, times)


def test_an_added_sizing_policy_sets_the_capacity(longest: str) -> None:
    cache = opened(
        "--strategy", longest, "--capacity-chunks", "8", "--min-capacity-chunks", "2", "--adjust-every-requests", "2"
    )
    capacities = []
    for chunks in (3, 5, 1, 1):
        with cache.lookup(prompt(chunks)) as prefix:
            capacities.append(prefix.capacity_chunks)
    cache.close()
    assert capacities == [8, 5, 5, 2]


@given(requests=loads)
def test_an_added_sizing_policy_is_under_the_contract(longest: str, requests) -> None:
    check_bounds(longest, requests)


def test_added_policies_are_compared_like_the_others(most_recent: str, longest: str) -> None:
    config = cache_experiments.COMMAND.parse(["--strategies", "static,longest", "--eviction", "most_recent"])
    named = [variant.job.cache for variant in cache_experiments.variants(config, "x")]
    assert [(cache.sizing.strategy, cache.eviction) for cache in named] == [
        ("STATIC", most_recent),
        (longest, most_recent),
    ]
    lab = LabConfig(eviction="most_recent", sizing="longest", capacity="64", bounds=False)
    (row,) = rows(lab, make_load(lab), "phases")
    assert (row.eviction, row.sizing) == ("most_recent", "longest")
    assert row.outcome.accesses > row.outcome.hits > 0

"""The rows of the result: every combination of policies and capacities, and the bounds."""

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pandas as pd

from cache.config import SizingConfig
from cache.eviction import make_eviction
from cache.sizing import make_sizing
from experiments.lab import bounds
from experiments.lab.config import LabConfig
from experiments.lab.drive import ReplayResult, Served, run
from experiments.lab.load import Load
from experiments.report import Shown

INFINITE, BELADY, BELADY_BYPASS = "infinite", "belady", "belady-bypass"
BOUNDS = (INFINITE, BELADY, BELADY_BYPASS)
BEST_STATIC = "best-static"

SHOWN: tuple[Shown, ...] = (
    ("eviction", "eviction", ""),
    ("sizing", "sizing", ""),
    ("capacity", "capacity_chunks", ",.0f"),
    ("mean", "mean_capacity_chunks", ",.0f"),
    ("peak", "peak_capacity_chunks", ",.0f"),
    ("hit %", "hit_percent", ".2f"),
    ("prefix hit %", "prefix_hit_percent", ".2f"),
    ("token hit %", "token_hit_percent", ".2f"),
    ("refused", "refused", ",.0f"),
    ("seconds", "runtime_s", ",.1f"),
)


@dataclass(frozen=True)
class Course:
    """Capacity and prefix hits of one run, request by request."""

    at_s: "array[float]" = field(default_factory=lambda: array("d"))
    capacity_chunks: "array[int]" = field(default_factory=lambda: array("q"))
    accesses: "array[int]" = field(default_factory=lambda: array("q"))
    prefix_hits: "array[int]" = field(default_factory=lambda: array("q"))

    def add(self, served: Served) -> None:
        self.at_s.append(served.at_ms / 1000)
        self.capacity_chunks.append(served.capacity_chunks)
        self.accesses.append(served.accesses)
        self.prefix_hits.append(served.prefix_hits)


@dataclass(frozen=True)
class LabRow:
    """One combination and its result. `capacity_chunks` is the initial capacity."""

    trace: str
    eviction: str
    sizing: str
    capacity_chunks: int
    outcome: ReplayResult
    course: Course | None = None
    """Set if sizing policies are compared."""

    @property
    def moves(self) -> bool:
        """True if the capacity may have changed during the run."""
        return self.course is not None and self.sizing != "static"


def combinations(config: LabConfig) -> list[tuple[str, str, int]]:
    return [
        (eviction, strategy, capacity)
        for eviction in config.evictions
        for strategy in config.sizings
        for capacity in config.capacities
    ]


def steps(config: LabConfig) -> int:
    """Maximum number of rows that `rows` yields."""
    found = len(combinations(config))
    if config.bounds:
        found += 1 + 2 * len(config.capacities)
    if config.target_prefix_hit_ratio is not None:
        found += len(config.evictions)
    return found


def rows(
    config: LabConfig, load: Load, trace: str, step: Callable[[str], None] = lambda doing: None
) -> Iterator[LabRow]:
    """Run all combinations; `step` gets the name of each run before it begins."""
    for eviction, strategy, capacity in combinations(config):
        step(f"{eviction} {strategy} {capacity}".lower())
        sizing = config.sizing_config(strategy, capacity)
        course = None if config.sizings == ("STATIC",) else Course()
        outcome = _run(config, load, eviction, sizing, course)
        yield LabRow(trace, eviction.lower(), strategy.lower(), capacity, outcome, course)
    if config.bounds:
        yield from _bounds(config, load, trace, step)
    if config.target_prefix_hit_ratio is not None:
        for eviction in config.evictions:
            found = best_static(config, load, eviction, config.target_prefix_hit_ratio, step)
            if found is not None:
                yield LabRow(trace, eviction.lower(), BEST_STATIC, *found)


def best_static(
    config: LabConfig, load: Load, eviction: str, target: float, step: Callable[[str], None] = lambda doing: None
) -> tuple[int, ReplayResult] | None:
    """Find the smallest fixed capacity whose prefix hit ratio reaches `target`, and its run.

    None if even a capacity for all blocks does not reach it. Found by bisection, which is exact if more capacity never
    costs hits. This holds for LRU, and nearly for the others.
    """

    def at(capacity: int) -> ReplayResult:
        step(f"{eviction} {BEST_STATIC}, {capacity}?".lower())
        return _run(config, load, eviction, config.sizing_config("STATIC", capacity), None)

    enough = bounds.infinite(load()).peak_capacity_chunks
    best = at(enough)
    if _ratio(best.prefix_hits, best.accesses) < target:
        return None
    too_small = 0
    while enough - too_small > 1:
        middle = (enough + too_small) // 2
        outcome = at(middle)
        if _ratio(outcome.prefix_hits, outcome.accesses) >= target:
            enough, best = middle, outcome
        else:
            too_small = middle
    return enough, best


def table(results: Sequence[LabRow]) -> pd.DataFrame:
    """One row per combination. docs/metrics.md describes the columns."""
    return pd.DataFrame([_columns(row) for row in results])


def _run(config: LabConfig, load: Load, eviction: str, sizing: SizingConfig, course: Course | None) -> ReplayResult:
    watch = (lambda served: None) if course is None else course.add
    return run(load(), make_eviction(eviction), make_sizing(sizing), config.drive, watch)


def _bounds(config: LabConfig, load: Load, trace: str, step: Callable[[str], None]) -> Iterator[LabRow]:
    step(INFINITE)
    outcome = bounds.infinite(load())
    yield LabRow(trace, INFINITE, "static", outcome.peak_capacity_chunks, outcome)
    upcoming = bounds.next_uses(load())
    for name in (BELADY, BELADY_BYPASS):
        for capacity in config.capacities:
            step(f"{name} {capacity}")
            outcome = bounds.belady(load(), upcoming, capacity, bypass=name == BELADY_BYPASS)
            yield LabRow(trace, name, "static", capacity, outcome)


def _columns(row: LabRow) -> dict[str, object]:
    outcome = row.outcome
    hit_ratio = _ratio(outcome.hits, outcome.accesses)
    prefix_hit_ratio = _ratio(outcome.prefix_hits, outcome.accesses)
    token_hit_ratio = _ratio(outcome.hit_tokens, outcome.tokens)
    return {
        "trace": row.trace,
        "eviction": row.eviction,
        "sizing": row.sizing,
        "capacity_chunks": row.capacity_chunks,
        "requests": outcome.requests,
        "accesses": outcome.accesses,
        "hits": outcome.hits,
        "hit_ratio": hit_ratio,
        "prefix_hits": outcome.prefix_hits,
        "prefix_hit_ratio": prefix_hit_ratio,
        "token_hit_ratio": token_hit_ratio,
        "mean_capacity_chunks": outcome.mean_capacity_chunks,
        "peak_capacity_chunks": outcome.peak_capacity_chunks,
        "chunk_seconds": outcome.chunk_ms / 1000,
        "runtime_s": outcome.runtime_s,
        "evictions": outcome.evictions,
        "refused": outcome.refused,
        "span_s": outcome.span_ms / 1000,
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0

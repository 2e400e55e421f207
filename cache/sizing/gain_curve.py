"""What another chunk would gain: the concave majorant of hits over capacity."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cache.sizing.miss_ratio_curve import MissRatioCurve

LEAST_SPAN_S = 1.0
"""A curve is taken to span this at least: what came at once is no gain of thousands a second."""
_POINTS = 128
"""Capacities that a curve is read at, a few percent apart from one another."""


@dataclass(frozen=True)
class Step:
    """A stretch of a curve along which every chunk gains as much."""

    chunks: int
    gain: float
    """Hits per second that each of these chunks gains: hits per chunk-second."""


@dataclass(frozen=True)
class GainCurve:
    """Steps of falling gain, from the first chunk on. Beyond the last of them a chunk gains nothing."""

    steps: tuple[Step, ...]

    @classmethod
    def of(cls, curve: MissRatioCurve, greatest_chunks: int) -> "GainCurve":
        """The gain curve of the hits that `curve` counted, for capacities up to `greatest_chunks`.

        The majorant, as a capacity within a dent of the curve is never worth its price: either end of the dent is.
        """
        capacities = _capacities(greatest_chunks)
        hits_per_s = curve.hits(capacities) / max(curve.seconds, LEAST_SPAN_S)
        return cls(tuple(_majorant(capacities, hits_per_s.tolist())))

    def knee(self, price: float) -> int:
        """The capacity from which on another chunk gains less than `price` hits per chunk-second."""
        return sum(step.chunks for step in self.steps if step.gain >= price)


def _capacities(greatest_chunks: int) -> Sequence[int]:
    if greatest_chunks < 1:
        return [0]
    return [0, *np.unique(np.rint(np.geomspace(1, greatest_chunks, _POINTS)).astype(int)).tolist()]


def _majorant(capacities: Sequence[int], hits_per_s: Sequence[float]) -> Iterator[Step]:
    """Andrew's monotone chain: a point that lies on or below the line between its neighbours is left out."""
    kept: list[tuple[int, float]] = []
    for x, y in zip(capacities, hits_per_s, strict=True):
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) <= _slope(kept[-1], (x, y)):
            kept.pop()
        kept.append((x, y))
    for before, after in itertools.pairwise(kept):
        if (gain := _slope(before, after)) > 0:
            yield Step(after[0] - before[0], gain)


def _slope(before: tuple[int, float], after: tuple[int, float]) -> float:
    return (after[1] - before[1]) / (after[0] - before[0])

"""How many hits one more chunk would gain: the concave majorant of hits over capacity."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cache.sizing.miss_ratio_curve import MissRatioCurve

LEAST_SPAN_S = 1.0
"""Minimum time span of a curve: two hits within 1 ms are not a gain of 2,000 per second."""
_POINTS = 128
"""Number of capacities at which a curve is evaluated, a few percent apart."""


@dataclass(frozen=True)
class Step:
    """A part of a curve in which every chunk gains the same."""

    chunks: int
    gain: float
    """Hits per second that each of these chunks gains (hits per chunk-second)."""


@dataclass(frozen=True)
class GainCurve:
    """Steps of decreasing gain, from the first chunk on. Beyond the last step a chunk gains nothing."""

    steps: tuple[Step, ...]

    @classmethod
    def of(cls, curve: MissRatioCurve, greatest_chunks: int) -> "GainCurve":
        """The gain curve of the hits that `curve` counted, for capacities up to `greatest_chunks`.

        It is the concave majorant: at any price, one end of a dent in the curve is a better capacity than its inside.
        """
        capacities = _capacities(greatest_chunks)
        hits_per_s = curve.hits(capacities) / max(curve.seconds, LEAST_SPAN_S)
        return cls(tuple(_majorant(capacities, hits_per_s.tolist())))

    def knee(self, price: float) -> int:
        """The capacity beyond which one more chunk gains less than `price` hits per chunk-second."""
        return sum(step.chunks for step in self.steps if step.gain >= price)


def _capacities(greatest_chunks: int) -> Sequence[int]:
    if greatest_chunks < 1:
        return [0]
    return [0, *np.unique(np.rint(np.geomspace(1, greatest_chunks, _POINTS)).astype(int)).tolist()]


def _majorant(capacities: Sequence[int], hits_per_s: Sequence[float]) -> Iterator[Step]:
    """Andrew's monotone chain: leaves out points on or below the line between their neighbours."""
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

"""Prometheus counters and histograms for the hot path. One thread writes them; any thread may read them.

The library's own metrics take a lock at each update, which was a tenth of the work of Flink's worker per request. These
classes keep plain numbers, and build the library's metric families when Prometheus scrapes.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class CountTally(Collector):
    """A counter for each value of a label, or a single counter. The slot is a label too."""

    def __init__(self, name: str, text: str, slot: str, label: str = "", values: Iterable[str] = ("",)) -> None:
        self.counts = dict.fromkeys(values, 0)
        self._name, self._text = name, text
        self._slot = slot
        self._label = label

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=["slot", *([self._label] if self._label else [])])
        for value, count in self.counts.items():
            family.add_metric([self._slot, *([value] if self._label else [])], count)
        yield family


class TimeTally(Collector):
    """A histogram of durations."""

    def __init__(self, name: str, text: str, slot: str, bounds_s: Sequence[float]) -> None:
        """`bounds_s`: upper bounds of the buckets, in rising order. A last bucket has no bound."""
        self._name, self._text = name, text
        self._slot = slot
        self._bounds_s = bounds_s
        self._counts = [0] * (len(bounds_s) + 1)
        self._sum_s = 0.0

    def add(self, time_s: float) -> None:
        """Add a duration, at least 0."""
        self._counts[bisect_left(self._bounds_s, time_s)] += 1
        self._sum_s += time_s

    def collect(self) -> Iterator[Metric]:
        bounds = [*map(floatToGoString, self._bounds_s), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        family = HistogramMetricFamily(self._name, self._text, labels=["slot"])
        family.add_metric([self._slot], buckets, self._sum_s)
        yield family

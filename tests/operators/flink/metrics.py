"""A metric group that records the metrics of a function. A metric's name begins with the names of its groups."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyflink.metrics import Counter, Distribution, Meter, MetricGroup


class RecordedMetrics:
    """Metrics of all groups by name."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = defaultdict(int)
        self.values: dict[str, list[int]] = defaultdict(list)
        """The values of each distribution."""
        self.gauges: dict[str, Callable[[], Any]] = {}
        self.counts_now = False

    @contextmanager
    def counting(self) -> Iterator[None]:
        """True while an element or a timer is processed. Flink does not see counts from elsewhere, such as `open`."""
        self.counts_now = True
        try:
            yield
        finally:
            self.counts_now = False

    def gauge(self, name: str) -> int:
        """The values that it would show now. Beam has integers only."""
        return int(self.gauges[name]())


class RecordedGroup(MetricGroup):
    def __init__(self, record: RecordedMetrics, prefix: str = "") -> None:
        self._record = record
        self._prefix = prefix

    def add_group(self, name: str, extra: str | None = None) -> "RecordedGroup":
        group = RecordedGroup(self._record, f"{self._prefix}{name}.")
        return group if extra is None else group.add_group(extra)

    def counter(self, name: str) -> "Recorded":
        return Recorded(self._record, self._prefix + name)

    def gauge(self, name: str, obj: Callable[[], int]) -> None:
        self._record.gauges[self._prefix + name] = obj

    def meter(self, name: str, time_span_in_seconds: int = 60) -> "Recorded":
        return self.counter(name)

    def distribution(self, name: str) -> "Recorded":
        return self.counter(name)


class Recorded(Counter, Meter, Distribution):
    """A metric of any kind that takes numbers."""

    def __init__(self, record: RecordedMetrics, name: str) -> None:
        self._record = record
        self._name = name

    def inc(self, n: int = 1) -> None:
        if self._record.counts_now:
            self._record.counts[self._name] += n

    def dec(self, n: int = 1) -> None:
        self.inc(-n)

    def mark_event(self, value: int = 1) -> None:
        self.inc(value)

    def get_count(self) -> int:
        return self._record.counts[self._name]

    def update(self, value: int) -> None:
        if self._record.counts_now:
            self._record.values[self._name].append(value)

"""Tallies show the same as the counters and histograms of the library."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from operators.metrics.tally import CountTally, TimeTally

BOUNDS_S = (0.005, 0.1, 1.0, 10.0, 600.0)


def written(registry: CollectorRegistry) -> list[str]:
    """The lines of a scrape without the times of creation."""
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if "_created" not in line]


@given(st.lists(st.sampled_from([0.0, *BOUNDS_S]) | st.floats(0, 1e6)))
def test_times_fall_into_the_buckets_of_the_library(times_s: list[float]) -> None:
    library, ours = CollectorRegistry(), CollectorRegistry()
    expected = Histogram("x_seconds", "of a test", ["slot"], buckets=BOUNDS_S, registry=library).labels("3")
    tally = TimeTally("x_seconds", "of a test", "3", BOUNDS_S)
    ours.register(tally)
    for time_s in times_s:
        expected.observe(time_s)
        tally.add(time_s)
    assert written(ours) == written(library)


def test_counts_are_those_of_the_library() -> None:
    library, ours = CollectorRegistry(), CollectorRegistry()
    expected = Counter("words", "of a test", ["slot", "kind"], registry=library)
    plain = Counter("all", "of a test", ["slot"], registry=library).labels("3")
    kinds = CountTally("words", "of a test", "3", "kind", ("a", "b"))
    all_ = CountTally("all", "of a test", "3")
    for tally in (kinds, all_):
        ours.register(tally)
    for kind, count in (("a", 0), ("b", 2)):
        expected.labels("3", kind).inc(count)
        kinds.counts[kind] += count
    plain.inc(5)
    all_.counts[""] += 5
    assert written(ours) == written(library)

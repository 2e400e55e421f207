"""Bundles without the thread that samples them: user metrics still find their bundle."""

import threading

import pytest
from apache_beam.metrics import Metrics
from apache_beam.metrics.execution import MetricsContainer
from apache_beam.runners.worker.statesampler import StateSampler, get_current_tracker
from apache_beam.utils.counters import CounterFactory

from operators.flink.beam_worker import without_sampling


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is changed for the whole process is undone."""
    for name in ("start", "stop"):
        monkeypatch.setattr(StateSampler, name, getattr(StateSampler, name))


def make_sampler() -> StateSampler:
    return StateSampler("a-bundle", CounterFactory())  # type: ignore[no-untyped-call]


def test_a_bundle_has_no_thread_and_may_be_followed_by_another() -> None:
    without_sampling()
    without_sampling()
    sampler, threads = make_sampler(), threading.active_count()
    for _ in range(3):
        sampler.start()
        assert (threading.active_count(), get_current_tracker()) == (threads, sampler)
        assert (sampler.started, sampler.finished) == (True, False)
        sampler.stop_if_still_running()
        assert get_current_tracker() is None
        assert sampler.finished
        sampler.reset()


def test_a_bundle_that_began_before_ends_with_its_thread() -> None:
    sampler, threads = make_sampler(), threading.active_count()
    sampler.start()
    assert threading.active_count() == threads + 1
    without_sampling()
    sampler.stop_if_still_running()
    assert threading.active_count() == threads


def test_gauges_are_kept_for_the_step_that_sets_them() -> None:
    without_sampling()
    sampler, container = make_sampler(), MetricsContainer("step")
    state = sampler.scoped_state("step", "process", metrics_container=container)
    sampler.start()
    with state:
        Metrics.gauge("of-a-test", "rows").set(7)
    sampler.stop_if_still_running()
    ((key, gauge),) = container.get_cumulative().gauges.items()
    assert (key.metric.name, gauge.value) == ("rows", 7)

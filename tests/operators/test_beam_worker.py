"""Bundles without the sampling thread, and faster rows, behave as before."""

import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
from apache_beam.metrics import Metrics
from apache_beam.metrics.execution import MetricsContainer
from apache_beam.runners.worker.bundle_processor import BundleProcessor
from apache_beam.runners.worker.statesampler import StateSampler, get_current_tracker
from apache_beam.utils.counters import CounterFactory
from pyflink.common import Row, RowKind, Types
from pyflink.fn_execution import coder_impl_fast
from pyflink.fn_execution.coders import from_type_info

from operators.flink import beam_worker
from operators.flink.beam_worker import METRICS_S, make_lean

CHANGED: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (StateSampler, ("start", "stop")),
    (BundleProcessor, ("monitoring_infos",)),
    (Row, ("__setattr__", "__init__", "get_fields_by_names", "__eq__")),
    (coder_impl_fast, ("RowKind",)),
)


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes the changes to the whole process."""
    for owner, names in CHANGED:
        for name in names:
            monkeypatch.setattr(owner, name, getattr(owner, name))


def make_sampler() -> StateSampler:
    return StateSampler("a-bundle", CounterFactory())  # type: ignore[no-untyped-call]


def test_a_bundle_has_no_thread_and_may_be_followed_by_another() -> None:
    make_lean()
    make_lean()
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
    make_lean()
    sampler.stop_if_still_running()
    assert threading.active_count() == threads


def test_gauges_are_kept_for_the_step_that_sets_them() -> None:
    make_lean()
    sampler, container = make_sampler(), MetricsContainer("step")
    state = sampler.scoped_state("step", "process", metrics_container=container)
    sampler.start()
    with state:
        Metrics.gauge("of-a-test", "rows").set(7)
    sampler.stop_if_still_running()
    ((key, gauge),) = container.get_cumulative().gauges.items()
    assert (key.metric.name, gauge.value) == ("rows", 7)


def test_metrics_are_reported_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    class Processor:
        asked = 0

        def infos(self) -> list[int]:
            self.asked += 1
            return [self.asked]

    monkeypatch.setattr(beam_worker, "_monitoring_infos", Processor.infos)
    now_s = [100.0]
    monkeypatch.setattr(beam_worker.time, "monotonic", lambda: now_s[0])
    make_lean()
    one, other = Processor(), Processor()
    report: Callable[[Any], Any] = BundleProcessor.monitoring_infos
    assert [report(one), report(one), report(other)] == [[1], [], [1]]
    now_s[0] += 0.9 * METRICS_S
    assert report(one) == []
    now_s[0] += 0.2 * METRICS_S
    assert [report(one), report(one), report(other)] == [[2], [], [2]]


def _made() -> list[Any]:
    """Rows made in every way, and the results of Flink's coders for them."""
    coder: Any = from_type_info(Types.ROW_NAMED(["key", "value"], [Types.INT(), Types.STRING()])).get_impl()
    named = Row(value="b", key=2)
    deleted = Row.of_kind(RowKind.DELETE, 3, "c")
    rows = [Row(1, "a"), named, deleted, Row(None, "d"), Row("key", "value")(4, "e")]
    back = [coder.decode(coder.encode(row)) for row in rows]
    return [
        [(str(row), str(row.get_row_kind()), row.as_dict()) for row in back],
        [row == other for row in [*rows, *back] for other in [*rows, *back]],
        [pickle.loads(pickle.dumps(row)) == row for row in [*rows, *back]],
        [len(Row()), list(Row(5, 6)), hash(Row(5, 6)), named.key, named["value"], named.as_dict()],
    ]


def test_rows_are_what_they_were() -> None:
    before = _made()
    make_lean()
    assert _made() == before
    coder: Any = from_type_info(Types.ROW_NAMED(["key"], [Types.INT()])).get_impl()
    with pytest.raises(Exception, match="not exist"):
        coder.encode(Row(other=1))
    with pytest.raises(ValueError, match="Can not use both"):
        Row(1, key=2)

"""Removes overhead from Beam's worker, the process in which Flink runs Python functions.

- For each bundle, Beam starts a thread that samples what the worker does. At the end of the bundle it waits until that
  thread wakes up: 2 ms after an empty bundle, up to 10 ms after one of 50 ms. Flink does not show these samples.
- Beam reports all metrics after each bundle, although Flink reads them only every ten seconds.
- A record passes through a dozen `Row` objects. Each takes 4 us, because `Row` sets attributes through Python code, and
  looks up its kind in an enumeration.
"""

import threading
import time
from typing import Any

from apache_beam.runners.worker import statesampler
from apache_beam.runners.worker.bundle_processor import BundleProcessor
from pyflink.common import Row, RowKind
from pyflink.fn_execution import coder_impl_fast

METRICS_S = 1.0
"""Time between two reports of metrics."""

_Sampler: Any = statesampler.StateSampler
_Processor: Any = BundleProcessor
_Row: Any = Row
_start, _stop = _Sampler.start, _Sampler.stop
_monitoring_infos = _Processor.monitoring_infos
_init, _fields_by_names, _equal = _Row.__init__, _Row.get_fields_by_names, _Row.__eq__
_KINDS = [RowKind(number) for number in range(len(RowKind))]
_INSERT = RowKind.INSERT


def make_lean() -> None:
    """Remove this overhead from all bundles and rows of this process. Idempotent."""
    _Sampler.start, _Sampler.stop = _start_alone, _stop_alone
    _Processor.monitoring_infos = _infos_now_and_then
    # The way of any object, which accepts all names.
    _Row.__setattr__ = object.__setattr__
    _Row.__init__, _Row.get_fields_by_names, _Row.__eq__ = _init_of_values, _fields_of, _equal_of_values
    coder_impl_fast.RowKind = _KINDS.__getitem__


def _start_alone(sampler: Any) -> None:
    _track(sampler)
    sampler.tracked_thread = threading.current_thread()
    sampler.started = sampler.alone = True


def _stop_alone(sampler: Any) -> None:
    if not getattr(sampler, "alone", False):  # its bundle began before the change
        _stop(sampler)
        return
    _track(None)
    sampler.alone = False
    sampler.finished = True


def _track(sampler: Any) -> None:
    """Make `sampler` the one by which Beam finds user metrics."""
    tracker: Any = statesampler.set_current_tracker
    tracker(sampler)


def _infos_now_and_then(processor: Any) -> Any:
    now_s = time.monotonic()
    if now_s < getattr(processor, "next_infos_s", now_s):
        return []
    processor.next_infos_s = now_s + METRICS_S
    return _monitoring_infos(processor)


def _init_of_values(row: Any, *values: Any, **named: Any) -> None:
    if named:
        _init(row, *values, **named)
        return
    row._values = list(values)
    row._from_dict = False
    row._row_kind = _INSERT


def _fields_of(row: Any, names: list[str]) -> Any:
    own = row.__dict__.get("_fields")
    return row._values if own is None or own == names else _fields_by_names(row, names)


def _equal_of_values(row: Any, other: Any) -> Any:
    if type(row) is not type(other) or row.__dict__.get("_fields") != other.__dict__.get("_fields"):
        return _equal(row, other)
    return row._row_kind == other._row_kind and row._values == other._values

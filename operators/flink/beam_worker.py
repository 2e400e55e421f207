"""Beam's worker, in which Flink runs Python functions, without a cost that each of its bundles has for nothing.

Beam starts a thread for each bundle that samples what the worker is busy with. At the bundle's end it waits until that
thread wakes from its sleep: 2 ms after a bundle of no time, up to 10 ms after one of 50. Flink shows nothing of it.
"""

import threading
from typing import Any

from apache_beam.runners.worker import statesampler

_Sampler: Any = statesampler.StateSampler
_start, _stop = _Sampler.start, _Sampler.stop


def without_sampling() -> None:
    """Let bundles of this process begin and end without that thread. Idempotent."""
    _Sampler.start, _Sampler.stop = _start_alone, _stop_alone


def _start_alone(sampler: Any) -> None:
    _track(sampler)
    sampler.tracked_thread = threading.current_thread()
    sampler.started = sampler.alone = True


def _stop_alone(sampler: Any) -> None:
    if not getattr(sampler, "alone", False):  # its bundle began before
        _stop(sampler)
        return
    _track(None)
    sampler.alone = False
    sampler.finished = True


def _track(sampler: Any) -> None:
    """User metrics are found by it."""
    tracker: Any = statesampler.set_current_tracker
    tracker(sampler)

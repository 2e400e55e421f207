"""Time series of a run: capacity and use summed over the slots, rolling hit rate, phases of the load."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.metrics import began_at_ms
from experiments.records import RunRecords
from workloads.phases import PHASES

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Stretch:
    """One phase of the load in seconds since its first request."""

    name: str
    begin_s: float
    end_s: float


def begin_ms(run: RunRecords) -> float:
    """Unix time at which the first request was created."""
    return min(sent.created_at_ms for sent in run.sent)


def summed_over_slots(answers: pd.DataFrame, column: str, origin_ms: float) -> tuple[Floats, Floats]:
    """`(seconds since origin, sum)` as a step function: each slot's value holds from one lookup to the next.

    It begins when every slot has had a lookup; before, the sum would miss some slots.
    """
    ordered = answers.assign(at_ms=began_at_ms(answers)).sort_values("at_ms", kind="stable")
    wide = ordered.pivot_table(index="at_ms", columns="slot", values=column, aggfunc="last").ffill().dropna()
    seconds = (wide.index.to_numpy(dtype=float) - origin_ms) / 1000
    return seconds, wide.sum(axis=1).to_numpy(dtype=float)


def rolling_local_hit_rate(answers: pd.DataFrame, requests: int, origin_ms: float) -> tuple[Floats, Floats]:
    """`(seconds, percent)`: share of local tokens in the prompts of the last `requests` requests, by lookup time."""
    ordered = answers.assign(at_ms=began_at_ms(answers)).sort_values("at_ms", kind="stable")
    window = ordered[["local_tokens", "prompt_tokens"]].rolling(requests, min_periods=min(requests, 5)).sum()
    percent = 100 * window["local_tokens"] / window["prompt_tokens"]
    seconds = (ordered["at_ms"].to_numpy(dtype=float) - origin_ms) / 1000
    return seconds, percent.to_numpy(dtype=float)


def phases(run: RunRecords) -> Sequence[Stretch]:
    """Phases of a phases load; empty for another load, or if only a part of it was sent."""
    config = run.manifest.workload
    if config.workload != "phases" or len(run.sent) != config.requests:
        return ()
    origin_ms = begin_ms(run)
    due_s = sorted((sent.created_at_ms - origin_ms) / 1000 for sent in run.sent)
    stretches, first = [], 0
    for phase in PHASES:
        # In `workloads.phases`, request i belongs to a phase while 100 i < until_percent * requests.
        after = min(-(-phase.until_percent * config.requests // 100), config.requests)
        if after > first:
            end_s = due_s[min(after, config.requests - 1)]
            stretches.append(Stretch(f"{phase.users} users", due_s[first], end_s))
            first = after
    return stretches

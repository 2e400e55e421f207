"""The result file of the batch analysis: its columns and its own metrics."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from experiments.metrics import (
    batches,
    busy_share_percent,
    departure_rate,
    frame,
    keeps_up,
    percentile,
    ratio,
    shared,
    throughput_req_per_s,
)
from experiments.records import RunRecords
from experiments.report import Shown
from operators.config import Batching

SEED_COLUMNS = (
    "batch_size", "avg_wait_ms", "avg_latency_ms", "throughput_req_per_sec", "total_requests", "efficiency_notes",
)  # fmt: skip
OWN_COLUMNS = (
    "dead_letters", "duplicates", "p50_latency_ms", "p95_latency_ms", "p99_latency_ms",
    "avg_ttft_ms", "p50_ttft_ms", "p95_ttft_ms", "avg_tpot_ms", "avg_inference_ms", "output_tokens_per_s",
    "avg_batch_size", "p50_batch_size", "max_batch_size", "full_batches_percent", "avg_decode_rows",
    "busy_share_percent", "offered_rate", "reached_rate", "parallelism", "threads_per_slot", "max_wait_ms",
    "device", "engine", "model", "workload", "seed",
)  # fmt: skip
COLUMNS = SEED_COLUMNS + OWN_COLUMNS

SHOWN: tuple[Shown, ...] = (
    ("batch size", "batch_size", ""),
    ("requests", "total_requests", ",.0f"),
    ("dead", "dead_letters", ",.0f"),
    ("req/s", "throughput_req_per_sec", ".2f"),
    ("offered", "offered_rate", ".2f"),
    ("p50 ms", "p50_latency_ms", ",.0f"),
    ("p95", "p95_latency_ms", ",.0f"),
    ("p99", "p99_latency_ms", ",.0f"),
    ("TTFT ms", "avg_ttft_ms", ",.0f"),
    ("wait ms", "avg_wait_ms", ",.0f"),
    ("realised", "avg_batch_size", ".1f"),
    ("decoding", "avg_decode_rows", ".1f"),
    ("busy %", "busy_share_percent", ".0f"),
)

CONTINUOUS = "continuous"


def batch_size(run: RunRecords) -> int | str:
    """Size at which this run's micro-batches close, or `continuous`."""
    batching = run.manifest.job.batching
    return batching.batch_size if batching.batching is Batching.MICRO else CONTINUOUS


def full_batches_percent(run: RunRecords, answers: pd.DataFrame) -> float:
    """Share of the micro-batches that closed at their size; the others closed by time. NaN for continuous batching."""
    size = batch_size(run)
    if size == CONTINUOUS:
        return math.nan
    sizes = batches(answers)
    return ratio(100.0 * int((sizes == size).sum()), len(sizes))


def row(run: RunRecords) -> dict[str, Any]:
    """One run's row of the CSV, in the order of `COLUMNS`. The note stays empty, because it compares rows."""
    answers = frame(run.responses)
    distinct = answers.drop_duplicates("batch_id")
    values = shared(run, answers) | {
        "batch_size": batch_size(run),
        "throughput_req_per_sec": throughput_req_per_s(answers),
        "efficiency_notes": "",
        "p50_batch_size": percentile(distinct, "batch_size", 50),
        "max_batch_size": percentile(distinct, "batch_size", 100),
        "full_batches_percent": full_batches_percent(run, answers),
        "busy_share_percent": busy_share_percent(answers, run.manifest.job.parallelism),
        "max_wait_ms": math.nan if batch_size(run) == CONTINUOUS else run.manifest.job.batching.max_wait_ms,
    }
    return {name: values[name] for name in COLUMNS}


def table(runs: Sequence[RunRecords]) -> pd.DataFrame:
    """One row per run, in the order of `COLUMNS`, compared with the row of the smallest batch size."""
    rows = [row(run) for run in runs]
    sized = [made for made in rows if made["batch_size"] != CONTINUOUS]
    baseline = min(sized, key=lambda made: int(made["batch_size"]), default=rows[0])
    for made in rows:
        made["efficiency_notes"] = efficiency_notes(made, baseline)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def efficiency_notes(values: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    """One short sentence that compares the row with `baseline`."""
    said = [_compared(values, baseline)]
    if values["batch_size"] == CONTINUOUS:
        if not math.isnan(values["avg_decode_rows"]):
            said.append(f"{values['avg_decode_rows']:.1f} sequences decode together")
    elif values["batch_size"] > 1 and not math.isnan(values["full_batches_percent"]):
        said.append(f"{100 - values['full_batches_percent']:.0f} % of batches closed by time")
    return "; ".join(said)


def notes(runs: Sequence[RunRecords]) -> list[str]:
    """Each row's note, and a warning for rows that do not keep up: their latency depends on the length of the run."""
    said = [f"{run.manifest.variant}: {note}." for run, note in zip(runs, table(runs)["efficiency_notes"], strict=True)]
    for run in runs:
        answers = frame(run.responses)
        if not keeps_up(run, answers):
            said.append(
                f"{run.manifest.variant}: answers at {departure_rate(answers):.2f} of the offered "
                f"{run.manifest.load.offered_rate:.2f} requests/s; the longer the run, the greater its latency."
            )
    return said


def _compared(values: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    if values is baseline:
        return "what the others are compared with"
    throughput = ratio(values["throughput_req_per_sec"], baseline["throughput_req_per_sec"])
    p95 = ratio(values["p95_latency_ms"], baseline["p95_latency_ms"])
    if math.isnan(throughput) or math.isnan(p95):
        return "nothing to compare"
    name = baseline["batch_size"]
    return f"{throughput:.2f}x the throughput of batch {name} at {p95:.2f}x its p95"

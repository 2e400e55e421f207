"""The result file of the cache experiments: its columns and its own metrics."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.metrics import began_at_ms, frame, ratio, shared, throughput_req_per_s
from experiments.records import RunRecords
from experiments.report import Shown
from operators.config import JobConfig

SEED_COLUMNS = (
    "strategy", "total_requests", "cache_hits", "hit_rate_percent", "avg_latency_ms", "strategy_config",
)  # fmt: skip
OWN_COLUMNS = (
    "eviction", "dead_letters", "duplicates", "local_hits", "remote_hits",
    "token_hit_rate_percent", "local_token_hit_rate_percent", "remote_token_hit_rate_percent",
    "p50_latency_ms", "p95_latency_ms", "p99_latency_ms",
    "avg_ttft_ms", "p50_ttft_ms", "p95_ttft_ms", "avg_tpot_ms", "avg_wait_ms", "avg_inference_ms",
    "throughput_req_per_s", "output_tokens_per_s",
    "mean_capacity_chunks", "peak_capacity_chunks", "mean_capacity_bytes", "peak_capacity_bytes", "avg_batch_size",
    "parallelism", "device", "engine", "model", "workload", "seed", "offered_rate", "reached_rate",
)  # fmt: skip
COLUMNS = SEED_COLUMNS + OWN_COLUMNS

SHOWN: tuple[Shown, ...] = (
    ("strategy", "strategy", ""),
    ("eviction", "eviction", ""),
    ("requests", "total_requests", ",.0f"),
    ("dead", "dead_letters", ",.0f"),
    ("hit %", "hit_rate_percent", ".1f"),
    ("token hit %", "token_hit_rate_percent", ".1f"),
    ("local %", "local_token_hit_rate_percent", ".1f"),
    ("remote %", "remote_token_hit_rate_percent", ".1f"),
    ("mean ms", "avg_latency_ms", ",.0f"),
    ("p50", "p50_latency_ms", ",.0f"),
    ("p95", "p95_latency_ms", ",.0f"),
    ("p99", "p99_latency_ms", ",.0f"),
    ("TTFT ms", "avg_ttft_ms", ",.0f"),
    ("req/s", "throughput_req_per_s", ".2f"),
    ("mean chunks", "mean_capacity_chunks", ",.0f"),
    ("peak chunks", "peak_capacity_chunks", ",.0f"),
)

TIERS = ("local", "remote", "computed")


def cache_hits(answers: pd.DataFrame) -> int:
    """Number of requests with at least one prompt token from either tier."""
    return int((answers["local_tokens"] + answers["remote_tokens"] > 0).sum())


def tier_hits(answers: pd.DataFrame, tier: str) -> int:
    """Number of requests with at least one prompt token from `tier`. A request may count for both tiers."""
    return int((answers[f"{tier}_tokens"] > 0).sum())


def hit_rate_percent(answers: pd.DataFrame) -> float:
    return ratio(100.0 * cache_hits(answers), len(answers))


def token_share_percent(answers: pd.DataFrame, tier: str) -> float:
    """Share of prompt tokens from `tier` (local, remote or computed). The three shares add up to 100."""
    return ratio(100.0 * float(answers[f"{tier}_tokens"].sum()), float(answers["prompt_tokens"].sum()))


def token_hit_rate_percent(answers: pd.DataFrame) -> float:
    """Share of prompt tokens from either tier."""
    reused = float(answers["local_tokens"].sum() + answers["remote_tokens"].sum())
    return ratio(100.0 * reused, float(answers["prompt_tokens"].sum()))


def mean_capacity_chunks(answers: pd.DataFrame) -> float:
    """Time-weighted mean capacity of each slot, summed over the slots.

    A capacity holds from the lookup that saw it to the slot's next lookup; the last one holds to the end of the run.
    """
    if answers.empty:
        return math.nan
    end_ms = float(answers["completed_at_ms"].max())
    return float(sum(_mean_over_time(rows, end_ms) for _, rows in answers.groupby("slot")))


def peak_capacity_chunks(answers: pd.DataFrame) -> float:
    """Greatest capacity of each slot, summed over the slots: the memory that the slots need."""
    if answers.empty:
        return math.nan
    return float(answers.groupby("slot")["cache_capacity_chunks"].max().sum())


def chunk_bytes(answers: pd.DataFrame) -> float:
    """Size of one chunk. All chunks of a model have the same size."""
    return math.nan if answers.empty else float(answers["chunk_bytes"].max())


def strategy_config(job: JobConfig) -> str:
    """Parameters that the strategy reads, as one JSON object with sorted keys."""
    sizing = job.cache.sizing
    values: dict[str, Any] = {"capacity_chunks": sizing.capacity_chunks}
    if sizing.strategy != "STATIC":
        names = ["min_capacity_chunks", "max_capacity_chunks", "adjust_every_requests"]
        prefix = f"{sizing.strategy.lower()}_"
        names += [name for name in type(sizing).model_fields if name.startswith(prefix)]
        if sizing.shares_budget:
            names.append("budget_chunks")
        values |= {name: getattr(sizing, name) for name in names}
    return json.dumps(values, sort_keys=True)


def row(run: RunRecords) -> dict[str, Any]:
    """One run's row of the CSV, in the order of `COLUMNS`."""
    answers = frame(run.responses)
    mean_chunks, peak_chunks, size = mean_capacity_chunks(answers), peak_capacity_chunks(answers), chunk_bytes(answers)
    values = shared(run, answers) | {
        "strategy": str(run.manifest.job.cache.sizing.strategy),
        "eviction": str(run.manifest.job.cache.eviction),
        "cache_hits": cache_hits(answers),
        "hit_rate_percent": hit_rate_percent(answers),
        "strategy_config": strategy_config(run.manifest.job),
        "local_hits": tier_hits(answers, "local"),
        "remote_hits": tier_hits(answers, "remote"),
        "token_hit_rate_percent": token_hit_rate_percent(answers),
        "local_token_hit_rate_percent": token_share_percent(answers, "local"),
        "remote_token_hit_rate_percent": token_share_percent(answers, "remote"),
        "throughput_req_per_s": throughput_req_per_s(answers),
        "mean_capacity_chunks": mean_chunks,
        "peak_capacity_chunks": peak_chunks,
        "mean_capacity_bytes": mean_chunks * size,
        "peak_capacity_bytes": peak_chunks * size,
    }
    return {name: values[name] for name in COLUMNS}


def table(runs: Sequence[RunRecords]) -> pd.DataFrame:
    """One row per run, in the order of `COLUMNS`."""
    return pd.DataFrame([row(run) for run in runs], columns=list(COLUMNS))


def _mean_over_time(slot: pd.DataFrame, end_ms: float) -> float:
    ordered = slot.assign(at_ms=began_at_ms(slot)).sort_values("at_ms")
    moments = ordered["at_ms"].to_numpy(dtype=float)
    values = ordered["cache_capacity_chunks"].to_numpy(dtype=float)
    held_ms = np.diff(np.append(moments, end_ms))
    # If all lookups are at the very end, there is no time to weigh by.
    return float(np.average(values, weights=held_ms)) if held_ms.sum() > 0 else float(values.mean())

"""What a person gets at the end: the CSV, the figure, and a table on the screen."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from experiments.records import RunRecords

SHOWN = (
    ("strategy", "strategy", ""),
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
"""Of the result file: heading, column, format."""
WIDTH = 150
"""Where no terminal says how wide it is."""


def write_csv(results: pd.DataFrame, path: Path) -> None:
    """Numbers with six decimals at most; what is not known is an empty cell."""
    results.round(6).to_csv(path, index=False)


def show(results: pd.DataFrame, runs: Sequence[RunRecords], console: Console | None = None) -> None:
    """Print the table, and below it what a reader has to know of it."""
    console = console or _console()
    table = Table(box=None, pad_edge=False, caption="\n".join(notes(runs)), caption_justify="left")
    for heading, _, shape in SHOWN:
        table.add_column(heading, justify="right" if shape else "left", no_wrap=True)
    for _, result in results.iterrows():
        table.add_row(*(_cell(result[column], shape) for _, column, shape in SHOWN))
    console.print(table)


def notes(runs: Sequence[RunRecords]) -> list[str]:
    """What limits the meaning of the numbers, a sentence each."""
    said = []
    if runs[0].manifest.job.engine.model == "default":
        said.append("The model is the built-in one with random weights: its answers mean nothing, its work is real.")
    for run in runs:
        name, load = run.manifest.variant, run.manifest.load
        if run.manifest.failures:
            said.append(f"{name}: Flink restarted the job ({run.manifest.failures[0]}); its latencies hold that too.")
        if run.dead_letters:
            said.append(f"{name}: {len(run.dead_letters)} dead letters, first: {run.dead_letters[0].reason}")
        if load.lag_late:
            said.append(f"{name}: {load.lag_late} requests left late, by up to {load.lag_max_ms:.0f} ms.")
    return said


def _cell(value: object, shape: str) -> str:
    return "-" if pd.isna(value) else format(value, shape)  # type: ignore[call-overload]


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)

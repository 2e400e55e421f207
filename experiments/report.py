"""Output of an experiment: the CSV, the table on the screen, and notes about the numbers."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from experiments.records import RunRecords

Shown = tuple[str, str, str]
"""A column of the table on the screen: heading, column of the result file, and number format (empty for text)."""
WIDTH = 150
"""Width of the table if the terminal does not tell its own."""


def write_csv(results: pd.DataFrame, path: Path) -> None:
    """Write numbers with at most six decimals, and unknown ones as empty cells."""
    results.round(6).to_csv(path, index=False)


def show(
    results: pd.DataFrame, shown: Sequence[Shown], said: Sequence[str] = (), console: Console | None = None
) -> None:
    """Print the `shown` columns, and the notes `said` below them."""
    console = console or _console()
    table = Table(box=None, pad_edge=False, caption="\n".join(said), caption_justify="left")
    for heading, _, shape in shown:
        table.add_column(heading, justify="right" if shape else "left", no_wrap=True)
    for _, result in results.iterrows():
        table.add_row(*(_cell(result[column], shape) for _, column, shape in shown))
    console.print(table)


def notes(runs: Sequence[RunRecords]) -> list[str]:
    """Sentences about limits of the numbers, for any experiment."""
    said = []
    if runs[0].manifest.simulated:
        said.append("The engine is simulated: nothing was computed, and times come from a device profile.")
    elif runs[0].manifest.job.engine.model == "default":
        said.append("The default model has random weights: its answers mean nothing, but its work is real.")
    for run in runs:
        name, load = run.manifest.variant, run.manifest.load
        if run.manifest.failures:
            said.append(f"{name}: Flink restarted the job ({run.manifest.failures[0]}); latencies include that.")
        if run.dead_letters:
            said.append(f"{name}: {len(run.dead_letters)} dead letters, first: {run.dead_letters[0].reason}")
        if run.manifest.duplicates:
            said.append(f"{name}: {run.manifest.duplicates} answers came twice; each request counts once.")
        if load.lag_late:
            said.append(f"{name}: {load.lag_late} requests left late, by up to {load.lag_max_ms:.0f} ms.")
    return said


def _cell(value: object, shape: str) -> str:
    return "-" if pd.isna(value) else format(value, shape)  # type: ignore[call-overload]


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)

"""What a person gets at the end: the CSV, the figure, and a table on the screen."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from experiments.records import RunRecords

Shown = tuple[str, str, str]
"""A column of the table on the screen: its heading, the result file's column, and a format; text has none."""
WIDTH = 150
"""Where no terminal says how wide it is."""


def write_csv(results: pd.DataFrame, path: Path) -> None:
    """Numbers with six decimals at most; what is not known is an empty cell."""
    results.round(6).to_csv(path, index=False)


def show(
    results: pd.DataFrame, shown: Sequence[Shown], said: Sequence[str] = (), console: Console | None = None
) -> None:
    """Print the `shown` columns, and below them what a reader has to know of them."""
    console = console or _console()
    table = Table(box=None, pad_edge=False, caption="\n".join(said), caption_justify="left")
    for heading, _, shape in shown:
        table.add_column(heading, justify="right" if shape else "left", no_wrap=True)
    for _, result in results.iterrows():
        table.add_row(*(_cell(result[column], shape) for _, column, shape in shown))
    console.print(table)


def notes(runs: Sequence[RunRecords]) -> list[str]:
    """What limits the meaning of any experiment's numbers, a sentence each."""
    said = []
    if runs[0].manifest.simulated:
        said.append("The engine is simulated: nothing was computed, times are those of a model of a device.")
    elif runs[0].manifest.job.engine.model == "default":
        said.append("The model is the built-in one with random weights: its answers mean nothing, its work is real.")
    for run in runs:
        name, load = run.manifest.variant, run.manifest.load
        if run.manifest.failures:
            said.append(f"{name}: Flink restarted the job ({run.manifest.failures[0]}); its latencies hold that too.")
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

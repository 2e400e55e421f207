"""The common look of all experiments' figures: style, colours, head and caption."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from experiments import metrics
from experiments.records import RunRecords

STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "hatch.linewidth": 0.7,
    "legend.frameon": False,
}


CAPTION_CHARACTERS = 145
"""Maximum characters per caption line, about the width of a figure."""


def answered(runs: Sequence[RunRecords]) -> list[RunRecords]:
    """Return the runs with at least one answer. Raises `ValueError` if there is none."""
    found = [run for run in runs if run.responses]
    if not found:
        raise ValueError("no run has an answer; there is nothing to draw")
    return found


@contextmanager
def four_panels(path: Path) -> Iterator[tuple[Any, Any]]:
    """Give `(figure, 2 x 2 axes)` to draw on, then write it to `path` as PNG."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(14, 9.6))
        try:
            yield figure, axes
            figure.tight_layout(rect=(0, 0.06, 1, 0.975), h_pad=2.0, w_pad=2.5)
            figure.savefig(path, dpi=130)
        finally:
            plt.close(figure)


def caption(runs: Sequence[RunRecords], *own: str) -> str:
    """The conditions for which the numbers hold: model, device, load, rate and the experiment's `own` conditions."""
    manifest = runs[0].manifest
    answers = metrics.frame(runs[0].responses)
    rate = manifest.load.offered_rate
    # The engine is left out if it is the same everywhere; the CSV has it.
    parts = (
        f"model {metrics.named(answers, 'model')}",
        f"device {metrics.named(answers, 'device')}",
        f"{manifest.workload.workload} workload, {manifest.load.sent} requests, seed {manifest.workload.seed}",
        "backlog" if rate is None else f"{rate:.2f} requests/s offered",
        *own,
    )
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) > CAPTION_CHARACTERS:
            lines.append(part)
        else:
            lines[-1] += f"  |  {part}"
    return "\n".join(lines)


def head(figure: Any, title: str, runs: Sequence[RunRecords], colours: Sequence[str], said: str) -> None:
    """Draw title, legend of the variants, and the caption `said` below."""
    handles = [Patch(facecolor=colour, label=label(run)) for run, colour in zip(runs, colours, strict=True)]
    figure.legend(handles=handles, loc="upper right", bbox_to_anchor=(0.985, 0.995), ncols=len(handles), fontsize=12)
    if any(run.manifest.simulated for run in runs):
        title = f"{title}: a simulated device"
    figure.suptitle(title, x=0.015, y=0.985, ha="left", fontsize=15, weight="bold")
    figure.text(0.015, 0.016, said, ha="left", va="bottom", fontsize=10.5, color="#333333")


def label(run: RunRecords) -> str:
    """The variant's name for a reader."""
    return run.manifest.variant.replace("_", " ")


def legend(axes: Any, handles: Sequence[Any], height: float = 1.015) -> None:
    """Draw the legend between panel and title, on the right. `height` is in units of the panel's height."""
    axes.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1.0, height),
        ncols=len(handles),
        borderaxespad=0,
        fontsize=10,
    )

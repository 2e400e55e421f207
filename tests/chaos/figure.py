"""The figure of all scenarios: requests and answers over time, with the time of the fault."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from experiments.figures import STYLE
from tests.chaos.scenario import Trial
from tests.chaos.table import recovery_s

COLUMNS = 4
SENT, ANSWERED, FAULT = "#999999", "#1f77b4", "#d62728"


def draw(trials: Sequence[Trial], path: Path) -> None:
    """Draw one panel per scenario, and write it to `path` as PNG."""
    rows = math.ceil(len(trials) / COLUMNS)
    with plt.rc_context(STYLE | {"font.size": 9, "axes.titlesize": 10}):
        figure, axes = plt.subplots(
            rows, min(COLUMNS, len(trials)), figsize=(15, 0.9 + 2.7 * rows), squeeze=False, layout="constrained"
        )
        try:
            for panel, trial in zip(axes.flat, trials, strict=False):
                _panel(panel, trial)
            for panel in axes.flat[len(trials) :]:
                panel.set_visible(False)
            lines, labels = axes.flat[0].get_legend_handles_labels()
            figure.legend(lines, labels, loc="outside upper right", ncols=len(labels), fontsize=10)
            figure.suptitle("Requests and answers around a fault", x=0.01, ha="left", fontsize=13, weight="bold")
            figure.savefig(path, dpi=120)
        finally:
            plt.close(figure)


def _panel(panel: Any, trial: Trial) -> None:
    origin_ms = min((sent.created_at_ms for sent in trial.book.all_sent), default=trial.fault_ms)
    sent = sorted((one.created_at_ms - origin_ms) / 1000 for one in trial.book.all_sent)
    came = [(received_ms - origin_ms) / 1000 for received_ms, _ in trial.book.answers]
    panel.step(sent, range(1, len(sent) + 1), where="post", color=SENT, label="requests created")
    panel.step(came, range(1, len(came) + 1), where="post", color=ANSWERED, label="answers read")
    if trial.fault_ms:
        begin_s, end_s = ((at_ms - origin_ms) / 1000 for at_ms in (trial.fault_ms, trial.healed_ms or trial.fault_ms))
        panel.axvspan(begin_s, end_s, color=FAULT, alpha=0.12, linewidth=0)
        panel.axvline(begin_s, color=FAULT, linewidth=1.2, label="fault, until it is healed")
    recovery = recovery_s(trial)
    panel.set_title(trial.scenario + ("" if math.isnan(recovery) else f": {recovery:.1f} s"))
    panel.set_xlabel("s")
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)

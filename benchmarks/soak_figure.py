"""Memory over time: one panel per kind of process, with the line fitted to the second half."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.trend import Trend
from experiments.figures import STYLE

Series = Mapping[str, tuple[list[float], list[float]]]
"""Seconds and MiB of each process."""
PANELS = {
    "Slots": ("slot",),
    "Python workers": ("worker",),
    "TaskManagers": ("taskmanager",),
    "JobManager, Kafka, Redis": ("jobmanager", "kafka", "redis", "zookeeper"),
}


def soak_figure(series: Series, kinds: Mapping[str, str], trends: Mapping[str, Trend], said: str, path: Path) -> None:
    """Write the figure to `path` as PNG, with the line `said` below it."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(14, 8.4))
        try:
            for panel, (title, shown) in zip(axes.flat, PANELS.items(), strict=True):
                mine = {name: points for name, points in series.items() if kinds[name] in shown}
                _panel(panel, title, mine, trends)
            figure.suptitle("Memory under a steady load", x=0.015, y=0.985, ha="left", fontsize=15, weight="bold")
            figure.text(0.015, 0.016, said, ha="left", va="bottom", fontsize=10.5, color="#333333")
            figure.tight_layout(rect=(0, 0.045, 1, 0.975), h_pad=2.0, w_pad=2.5)
            figure.savefig(path, dpi=120)
        finally:
            plt.close(figure)


def _panel(panel: Any, title: str, series: Series, trends: Mapping[str, Trend]) -> None:
    for name, (seconds, mib) in series.items():
        minutes = [second / 60 for second in seconds]
        trend = trends.get(name)
        slope = "" if trend is None else f": {trend.slope_mib_per_h:+.1f} ± {trend.error_mib_per_h:.1f} MiB/h"
        (line,) = panel.plot(minutes, mib, linewidth=1.4, label=name + slope)
        if trend is not None:
            ends = (trend.begin_s, seconds[-1])
            panel.plot(
                [at / 60 for at in ends], [trend.at(at) for at in ends], "--", color=line.get_color(), linewidth=1
            )
    panel.set_title(title)
    panel.set_xlabel("minutes")
    panel.set_ylabel("MiB")
    panel.margins(x=0)
    if series:
        panel.legend(fontsize=9, loc="best")

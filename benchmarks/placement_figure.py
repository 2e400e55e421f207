"""The figure of the placement benchmark: latency of each request over its creation time, one panel per placement."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.report import Report
from experiments.figures import STYLE, legend

SLOT_COLOURS = ("#0072b2", "#d55e00")
P95_LINE: dict[str, Any] = {"color": "#444444", "lw": 1.2, "ls": "--"}


def placement_figure(report: Report, path: Path) -> None:
    """Write the figure of all rounds of `report` to `path` as PNG."""
    created_s = np.asarray(report.samples["at_ms"]) / 1000
    placements = list(report.settings["placements"])
    with mpl.rc_context(STYLE):
        # Without pyplot, which would keep the figure in memory and look for a display.
        figure = Figure(figsize=(14, 6.2))
        for letter, placement, axes in zip("ab", placements, figure.subplots(1, 2, sharey=True), strict=True):
            e2e_s = np.asarray(report.samples[f"{placement}_e2e_ms"]) / 1000
            colours = [SLOT_COLOURS[int(slot)] for slot in report.samples[f"{placement}_slot"]]
            p95_s = report.figures[f"{placement}_p95_ms"] / 1000
            axes.scatter(created_s, e2e_s, s=18, lw=0, alpha=0.6, color=colours)
            axes.axhline(p95_s, **P95_LINE)
            axes.set_ylim(bottom=0)
            # The axes are shared, so the second panel would have no numbers.
            axes.tick_params(labelleft=True)
            axes.set_xlabel("created, since the load began (s)")
            axes.set_ylabel("created to answered (s)")
            axes.set_title(f"{letter}   Placement: {placement}", pad=26)
            dots = [
                Line2D([], [], ls="", marker="o", color=colour, label=f"answered by slot {slot}")
                for slot, colour in enumerate(SLOT_COLOURS)
            ]
            legend(axes, [*dots, Line2D([], [], label=f"p95 {p95_s:.1f} s", **P95_LINE)])
        figure.suptitle("Latency on a skewed load", x=0.015, y=0.975, ha="left", fontsize=15, weight="bold")
        figure.text(0.015, 0.02, caption(report), ha="left", va="bottom", fontsize=10.5, color="#333333")
        figure.tight_layout(rect=(0, 0.09, 1, 0.985), w_pad=2.5)
        figure.savefig(path, dpi=130)


def caption(report: Report) -> str:
    """The conditions for which the numbers hold: model, device, workload and rate."""
    load, figures = report.settings, report.figures
    longest = load["prompt_tokens"] + (load["turns"] - 1) * load["turn_tokens"]
    ramp_s = (load["turns"] - 1) * load["turn_gap_ms"] / 1000
    lines = (
        (
            f"model {report.model['name']}",
            f"device {report.machine['device']}, threads of a slot {report.machine['threads']}",
            f"{load['sessions']} sessions of {load['turns']} turns, {load['skew']:.0%} with default slot 0",
            f"rounds {report.rounds}, seed {load['seed']}",
        ),
        (
            f"prompts of {load['prompt_tokens']} to {longest} tokens, answers of {load['answer_tokens']}",
            f"{load['rate_per_s']:g} requests/s offered, fewer in the first and last {ramp_s:g} s",
            f"from a backlog one slot takes {figures['one_slot_requests_per_s']:.1f}, both "
            f"{figures['both_slots_requests_per_s']:.1f}",
        ),
    )
    return "\n".join("  |  ".join(parts) for parts in lines)

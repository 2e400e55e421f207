"""The figure of the scaling experiment: throughput against linear scaling, efficiency, and requests per device."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from experiments import metrics
from experiments.figures import answered, caption, four_panels, head, legend
from experiments.records import RunRecords
from experiments.scaling_metrics import cores, requests_per_device, table
from experiments.timeline import begin_ms

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
"""Palette of Okabe and Ito, which is distinguishable with any colour vision."""
MOST_NAMED = 12
"""Maximum number of devices whose bars have names below them."""


def scaling_figure(runs: Sequence[RunRecords], path: Path) -> None:
    """Write the figure of `runs` to `path` as PNG. Raises `ValueError` if none of them has an answer."""
    runs = sorted(answered(runs), key=_slots)
    results = table(runs)
    colours = [COLOURS[place % len(COLOURS)] for place in range(len(runs))]
    with four_panels(path) as (figure, ((throughput, efficiency), (devices, completion))):
        _draw_throughput(throughput, results, colours)
        _draw_efficiency(efficiency, results, colours)
        _draw_devices(devices, runs, colours)
        _draw_completion(completion, runs, colours)
        head(figure, f"Throughput over {_what_scales(runs)}", runs, colours, _caption(runs))


def _slots(run: RunRecords) -> int:
    return run.manifest.job.parallelism


def _what_scales(runs: Sequence[RunRecords]) -> str:
    devices = {name.rstrip("0123456789") for run in runs for name in requests_per_device(run)}
    return {"GPU": "GPUs", "CPU": "slots of one CPU"}.get("+".join(sorted(devices)), "slots")


def _caption(runs: Sequence[RunRecords]) -> str:
    threads = metrics.threads_per_slot(runs[0])
    found = cores(runs[0])
    job = runs[0].manifest.job
    return caption(
        runs,
        f"{job.batching.batching} batching",
        *([f"{found} cores" + (f", threads of a slot {threads}" if threads else "")] if found else []),
    )


def _draw_throughput(axes: Any, results: pd.DataFrame, colours: Sequence[str]) -> None:
    slots, reached = results["parallelism"].to_numpy(dtype=float), results["total_throughput"].to_numpy(dtype=float)
    ideal = reached[0] * slots / slots[0]
    axes.plot(slots, ideal, "--", color="#777777", lw=1.5)
    axes.plot(slots, reached, color="#444444", lw=1.5)
    axes.scatter(slots, reached, s=90, color=colours, zorder=3)
    top = 1.08 * max(np.nanmax(ideal), np.nanmax(reached))
    for x, y, factor in zip(slots, reached, results["scale_factor"], strict=True):
        # Below its point, because the ideal line is above; unless there is no space below.
        offset = -20 if y > 0.15 * top else 14
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        text = f"{y:.2f} ({factor:.2f}x)"
        axes.annotate(text, (x, y), xytext=(0, offset), textcoords="offset points", ha="center", va="center", bbox=box)
    axes.set_xticks(slots, [f"{count:.0f}" for count in slots])
    axes.set_ylim(0, top)
    axes.margins(x=0.16)
    axes.set_xlabel("slots")
    axes.set_ylabel("answers (requests/s)")
    axes.set_title("a   Throughput", pad=26)
    handles = [
        Line2D([], [], color="#444444", marker="o", label="reached"),
        Line2D([], [], color="#777777", ls="--", label="linear"),
    ]
    legend(axes, handles)


def _draw_efficiency(axes: Any, results: pd.DataFrame, colours: Sequence[str]) -> None:
    at = np.arange(len(results))
    bars = axes.bar(at - 0.2, 100 * results["efficiency"], 0.38, color=colours)
    busy = axes.bar(
        at + 0.2, results["utilisation_percent"], 0.38, facecolor="white", edgecolor=colours, hatch="///", lw=1
    )
    for drawn in (bars, busy):
        axes.bar_label(drawn, fmt="{:.0f} %", padding=2, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axes.axhline(100, color="#777777", lw=1.5, ls="--", zorder=0)
    axes.set_xticks(at, [f"{count:.0f}" for count in results["parallelism"]])
    axes.set_ylim(0, 1.1 * max(100, float(np.nanmax(100 * results["efficiency"]))))
    axes.set_xlabel("slots")
    axes.set_ylabel("%")
    axes.set_title("b   Efficiency", pad=26)
    handles = [
        Patch(color="#444444", label="of linear scaling"),
        Patch(facecolor="white", edgecolor="#444444", hatch="///", label="time that a slot is busy"),
    ]
    legend(axes, handles)


def _draw_devices(axes: Any, runs: Sequence[RunRecords], colours: Sequence[str]) -> None:
    counted = [requests_per_device(run) for run in runs]
    few = sum(map(len, counted)) <= MOST_NAMED
    place = 0
    ticks: list[tuple[float, str]] = []
    for counts, colour in zip(counted, colours, strict=True):
        at = list(range(place, place + len(counts)))
        bars = axes.bar(at, list(counts.values()), 0.8, color=colour)
        if few:
            axes.bar_label(bars, padding=2)
            ticks += zip(at, counts, strict=True)
        else:
            ticks.append(((at[0] + at[-1]) / 2, f"{len(counts)}"))
        # Gap between two variants.
        place += len(counts) + 1
    axes.set_xticks([at for at, _ in ticks], [name for _, name in ticks])
    axes.margins(y=0.1)
    axes.set_xlabel("device" if few else "devices")
    axes.set_ylabel("requests")
    axes.set_title("c   Requests of each device", pad=26)


def _draw_completion(axes: Any, runs: Sequence[RunRecords], colours: Sequence[str]) -> None:
    for run, colour in zip(runs, colours, strict=True):
        completed_ms = np.sort([answer.completed_at_ms for answer in run.responses])
        seconds = np.concatenate(([0.0], (completed_ms - begin_ms(run)) / 1000))
        axes.step(seconds, np.arange(len(seconds)), where="post", color=colour, lw=2.2)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("time since the first request (s)")
    axes.set_ylabel("requests answered")
    axes.set_title("d   Completion", pad=26)

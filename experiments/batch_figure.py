"""The figure of the batch analysis: latency over throughput, realised batch sizes, and the parts of the latency."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from experiments import metrics
from experiments.batch_metrics import CONTINUOUS, batch_size
from experiments.figures import answered, caption, four_panels, head, legend
from experiments.records import RunRecords

SIZE_COLOURS = ("#85bcdc", "#56a0ce", "#2f7ebc", "#0f57a0", "#08306b")
"""Colours from small to large micro-batches. One hue, because sizes are one scale."""
CONTINUOUS_COLOUR = "#d55e00"
PART_COLOURS = {
    "transit": "#bbbbbb", "wait": "#e69f00", "prefill": "#0072b2", "decode": "#56b4e9", "leaving": "#cc79a7",
}  # fmt: skip
PART_NAMES = {
    "transit": "to the slot", "wait": "waiting", "prefill": "prefill", "decode": "decode", "leaving": "until it leaves",
}  # fmt: skip
TICKS_MS = (1, 2, 5)
LETTER_PIXELS, LINE_PIXELS, GAP_PIXELS = 9, 17, 15
"""Approximate width of a letter, height of a line, and distance of a label from its dot."""


def batch_figure(runs: Sequence[RunRecords], path: Path) -> None:
    """Write the figure of `runs` to `path` as PNG. Raises `ValueError` if none of them has an answer."""
    runs = answered(runs)
    frames = [metrics.frame(run.responses) for run in runs]
    colours = _colours(runs)
    with four_panels(path) as (figure, ((trade_off, sizes), (parts, latency))):
        _draw_trade_off(trade_off, runs, frames, colours)
        _draw_sizes(sizes, runs, frames, colours)
        _draw_parts(parts, runs, frames)
        _draw_latency(latency, frames, colours)
        head(figure, "Batch size, latency and throughput", runs, colours, _caption(runs))


def _caption(runs: Sequence[RunRecords]) -> str:
    job, load = runs[0].manifest.job, runs[0].manifest.workload
    threads, own = metrics.threads_per_slot(runs[0]), []
    if load.workload == "independent" and load.independent.length_cv > 0:
        own.append(f"lengths vary by {load.independent.length_cv:g} of their mean")
    own.append(f"parallelism {job.parallelism}" + (f", threads of a slot {threads}" if threads else ""))
    return caption(runs, *own, f"micro-batches close after {job.batching.max_wait_ms:g} ms")


def _colours(runs: Sequence[RunRecords]) -> list[str]:
    sizes = sorted({size for run in runs if isinstance(size := batch_size(run), int)})
    last = len(SIZE_COLOURS) - 1
    scale = {size: SIZE_COLOURS[round(place * last / max(1, len(sizes) - 1))] for place, size in enumerate(sizes)}
    return [scale[size] if isinstance(size := batch_size(run), int) else CONTINUOUS_COLOUR for run in runs]


def _names(runs: Sequence[RunRecords]) -> list[str]:
    return [str(batch_size(run)) for run in runs]


def _draw_trade_off(
    axes: Any, runs: Sequence[RunRecords], frames: Sequence[pd.DataFrame], colours: Sequence[str]
) -> None:
    _log_ms(axes.yaxis)
    throughputs = [metrics.throughput_req_per_s(answers) for answers in frames]
    p50s, p95s = ([metrics.percentile(answers, "e2e_ms", percent) for answers in frames] for percent in (50, 95))
    for throughput, p50, p95, colour in zip(throughputs, p50s, p95s, colours, strict=True):
        axes.plot([throughput, throughput], [p50, p95], color=colour, lw=1.5)
        axes.plot(throughput, p50, "o", ms=9, color=colour)
        axes.plot(throughput, p95, "o", ms=9, markerfacecolor="white", markeredgecolor=colour, markeredgewidth=2)
    offered = runs[0].manifest.load.offered_rate
    if offered is not None:
        axes.axvline(offered, color="#777777", lw=1, ls="--", zorder=0)
    axes.margins(x=0.2, y=0.12)
    axes.set_xlabel("answers (requests/s)")
    axes.set_ylabel("created to answered (ms)")
    axes.set_title("a   Latency and throughput", pad=26)
    _label_beside(axes, list(zip(throughputs, p50s, p95s, strict=True)), _names(runs))
    dots = [
        Line2D([], [], ls="", marker="o", ms=9, color="#444444", label="p50"),
        Line2D([], [], ls="", marker="o", ms=9, mfc="white", mec="#444444", mew=2, label="p95"),
    ]
    line = [Line2D([], [], color="#777777", lw=1, ls="--", label="offered")] if offered is not None else []
    legend(axes, [*dots, *line])


def _label_beside(axes: Any, spans: Sequence[tuple[float, float, float]], names: Sequence[str]) -> None:
    """Write each span's name beside its upper end, or higher if something else is drawn there.

    A span is `(x, lower, upper)`.
    """
    axes.figure.canvas.draw()
    drawn = [axes.transData.transform((x, y)) for x, low, high in spans for y in np.geomspace(low, high, 12)]
    for (x, _, high), name in sorted(zip(spans, names, strict=True), key=lambda one: one[0][2]):
        across, up = axes.transData.transform((x, high))
        width, side = LETTER_PIXELS * len(name), -1
        while _taken(drawn, across + side * (GAP_PIXELS + width / 2), up, width):
            # Left, then right, then somewhat higher.
            side, up = -side, up + (2 if side > 0 else 0)
        drawn += [(across + side * (GAP_PIXELS + part * width), up) for part in (0.1, 0.5, 0.9)]
        _, height = axes.transData.inverted().transform((across, up))
        where = {"xytext": (10 * side, 0), "textcoords": "offset points", "ha": "left" if side > 0 else "right"}
        axes.annotate(name, (x, height), va="center", bbox=_white(), **where)


def _taken(drawn: Sequence[tuple[float, float]], across: float, up: float, width: float) -> bool:
    return any(abs(x - across) < width / 2 and abs(y - up) < LINE_PIXELS for x, y in drawn)


def _draw_sizes(axes: Any, runs: Sequence[RunRecords], frames: Sequence[pd.DataFrame], colours: Sequence[str]) -> None:
    for place, (run, answers, colour) in enumerate(zip(runs, frames, colours, strict=True)):
        sizes = metrics.batches(answers)
        bars = axes.bar(place, metrics.avg_batch_size(answers), 0.6, color=colour)
        axes.bar_label(bars, fmt="{:.1f}", label_type="center", color="black", bbox=_white())
        axes.plot(place, sizes.max(), "_", ms=34, mew=2, color="#444444")
        together = metrics.mean(answers, "decode_rows")
        if not np.isnan(together):
            axes.plot(place, together, "D", ms=8, mfc="white", mec="#444444", mew=1.5)
        size = batch_size(run)
        if size not in (1, CONTINUOUS):
            full = 100 * float((sizes == size).mean())
            axes.annotate(
                f"{full:.0f} % full", (place, sizes.max()), xytext=(0, 5), textcoords="offset points", ha="center"
            )
    axes.set_xticks(range(len(runs)), _names(runs))
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch size")
    axes.set_ylabel("requests")
    axes.set_title("b   Batches that came about", pad=26)
    handles = [
        Patch(color="#888888", label="mean"),
        Line2D([], [], ls="", marker="_", ms=16, mew=2, color="#444444", label="largest"),
        Line2D([], [], ls="", marker="D", ms=8, mfc="white", mec="#444444", mew=1.5, label="decoding together"),
    ]
    legend(axes, handles)


def _draw_parts(axes: Any, runs: Sequence[RunRecords], frames: Sequence[pd.DataFrame]) -> None:
    """Draw shares: the times themselves differ too much for one panel. The totals are beside the names."""
    for place, answers in enumerate(frames):
        means = metrics.parts_ms(answers).mean()
        total, left = float(means.sum()), 0.0
        for part in metrics.PARTS:
            share = max(0.0, 100 * float(means[part]) / total) if total > 0 else 0.0
            axes.barh(place, share, 0.62, left=left, color=PART_COLOURS[part])
            if share >= 11:
                axes.text(left + share / 2, place, _ms(float(means[part])), ha="center", va="center", fontsize=9.5)
            left += share
    totals = [_ms(metrics.mean(answers, "e2e_ms")) for answers in frames]
    names = [f"{name}\n{total}" for name, total in zip(_names(runs), totals, strict=True)]
    axes.set_yticks(range(len(runs)), names)
    axes.invert_yaxis()
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the mean latency (%)")
    axes.set_title("c   Where a request's time goes", pad=26)
    legend(axes, [Patch(color=PART_COLOURS[part], label=PART_NAMES[part]) for part in metrics.PARTS])


def _draw_latency(axes: Any, frames: Sequence[pd.DataFrame], colours: Sequence[str]) -> None:
    _log_ms(axes.xaxis)
    for answers, colour in zip(frames, colours, strict=True):
        ordered = np.sort(answers["e2e_ms"].to_numpy(dtype=float))
        axes.plot(ordered, 100 * np.arange(1, len(ordered) + 1) / len(ordered), color=colour, lw=2.2)
    for percent in (50, 95):
        axes.axhline(percent, color="#777777", lw=1, ls=":", zorder=0)
    axes.set_ylim(0, 101)
    axes.grid(visible=True, axis="both")
    axes.set_xlabel("created to answered (ms)")
    axes.set_ylabel("answered within that time (%)")
    axes.set_title("d   Latency of all requests", pad=26)


def _log_ms(axis: Any) -> None:
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.get_major_locator().set_params(subs=TICKS_MS)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_minor_formatter(NullFormatter())


def _ms(value: float) -> str:
    return f"{value / 1000:.1f} s" if value >= 1000 else f"{value:.0f} ms"


def _white() -> dict[str, Any]:
    return {"facecolor": "white", "edgecolor": "none", "pad": 1.5}

"""The policy lab's figures: hits over capacity, and capacity and hits over time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.figures import STYLE
from experiments.lab.table import BELADY, BELADY_BYPASS, BEST_STATIC, BOUNDS, INFINITE, LabRow

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
"""Palette of Okabe and Ito, which is distinguishable with any colour vision."""
BOUND_DASHES = {INFINITE: (1, 2), BELADY: (5, 2), BELADY_BYPASS: (8, 2, 2, 2)}
MARKERS = "osD^vPX"
WINDOWS = 60
"""Number of intervals of virtual time over which hits are averaged."""
MOST_PANELS = 3


def over_capacity(results: Sequence[LabRow], path: Path) -> None:
    """Draw the prefix hit ratio over the fixed capacity: one line per eviction policy, bounds dashed."""
    fixed = [row for row in results if row.sizing == "static"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9.5, 6))
        try:
            for place, eviction in enumerate(_names(fixed, BOUNDS)):
                points = sorted((row.capacity_chunks, _percent(row)) for row in fixed if row.eviction == eviction)
                colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=6, lw=2, label=eviction)
            for bound in BOUNDS:
                _draw_bound(axes, bound, [row for row in fixed if row.eviction == bound])
            axes.set_xscale("log")
            capacities = sorted({row.capacity_chunks for row in fixed if row.eviction != INFINITE})
            axes.set_xticks(capacities, [f"{capacity:,}" for capacity in capacities])
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
            axes.set_xlabel("capacity (chunks)")
            axes.set_ylabel("prefix hits (% of accesses)")
            axes.set_title(f"Eviction policies on {fixed[0].trace}", pad=12)
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
            _finish(figure, path)
        finally:
            plt.close(figure)


def over_time(results: Sequence[LabRow], path: Path) -> None:
    """Draw the capacity (top) and prefix hits (bottom) of each sizing policy; one column per eviction and capacity.

    If there are too many combinations, only the first are drawn. Raises `ValueError` if no run's capacity can change.
    """
    moving = [row for row in results if row.course is not None]
    if not any(row.moves for row in moving):
        raise ValueError("no run has a sizing policy that changes the capacity; there is nothing to draw")
    panels = list(dict.fromkeys((row.eviction, row.capacity_chunks) for row in moving))[:MOST_PANELS]
    sizings = list(dict.fromkeys(row.sizing for row in moving))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, len(panels), figsize=(max(5.2 * len(panels), 8), 7.2), sharex=True, sharey="row", squeeze=False
        )
        try:
            for column, panel in enumerate(panels):
                for row in moving:
                    if (row.eviction, row.capacity_chunks) == panel:
                        _draw_course(axes[0][column], axes[1][column], row, COLOURS[sizings.index(row.sizing)])
                _draw_best_static(axes[0][column], [row for row in results if row.eviction == panel[0]])
                axes[0][column].set_title(f"{panel[0]}, from {panel[1]:,} chunks", pad=10)
                axes[1][column].set_xlabel("virtual time (s)")
            # The columns of a row share one scale, so all must be drawn before it is read.
            for first in axes[:, 0]:
                first.set_ylim(bottom=0)
            axes[0][0].set_ylabel("capacity (chunks)")
            axes[1][0].set_ylabel(f"prefix hits (% of accesses,\n{WINDOWS} stretches of time)")
            handles, labels = axes[0][0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="upper right", ncols=len(labels), bbox_to_anchor=(0.99, 1.0))
            figure.suptitle(f"Sizing policies on {moving[0].trace}", x=0.015, ha="left", fontsize=15, weight="bold")
            _finish(figure, path)
        finally:
            plt.close(figure)


def _draw_bound(axes: Any, bound: str, found: Sequence[LabRow]) -> None:
    if not found:
        return
    style = {"color": "black", "lw": 1.5, "dashes": BOUND_DASHES[bound], "label": bound}
    if bound == INFINITE:
        axes.axhline(_percent(found[0]), **style)
    else:
        points = sorted((row.capacity_chunks, _percent(row)) for row in found)
        axes.plot(*zip(*points, strict=True), **style)


def _draw_course(capacity: Any, hits: Any, row: LabRow, colour: str) -> None:
    course = row.course
    if course is None:
        return
    at_s = np.asarray(course.at_s)
    capacity.step(at_s, np.asarray(course.capacity_chunks), where="post", color=colour, lw=1.8, label=row.sizing)
    edges = np.linspace(at_s[0], max(at_s[-1], at_s[0] + 1e-3), WINDOWS + 1)
    accesses, _ = np.histogram(at_s, edges, weights=np.asarray(course.accesses))
    found, _ = np.histogram(at_s, edges, weights=np.asarray(course.prefix_hits))
    some = accesses > 0
    hits.plot(((edges[1:] + edges[:-1]) / 2)[some], 100 * found[some] / accesses[some], color=colour, lw=1.8)


def _draw_best_static(capacity: Any, results: Sequence[LabRow]) -> None:
    for row in results:
        if row.sizing == BEST_STATIC:
            capacity.axhline(row.capacity_chunks, color="black", lw=1.5, dashes=BOUND_DASHES[BELADY], label=BEST_STATIC)


def _names(results: Sequence[LabRow], but: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys(row.eviction for row in results) if name not in (*but, BEST_STATIC)]


def _percent(row: LabRow) -> float:
    return 100 * row.outcome.prefix_hits / row.outcome.accesses if row.outcome.accesses else 0.0


def _finish(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")

"""The figure of the cache experiments: origin of prompt tokens, latency, and the local tier over time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from experiments import metrics
from experiments.cache_metrics import TIERS, token_share_percent
from experiments.figures import answered, caption, four_panels, head, legend
from experiments.records import RunRecords
from experiments.timeline import begin_ms, phases, rolling_local_hit_rate, summed_over_slots

COLOURS = {
    "STATIC": "#0072b2",
    "FLUID": "#d55e00",
    "FREQUENCY": "#009e73",
    "MRC": "#cc79a7",
}
"""Palette of Okabe and Ito, which is distinguishable with any colour vision."""
OTHER_COLOURS = ("#e69f00", "#56b4e9", "#555555", "#8c564b", "#b8a900")
TIER_ALPHA = {"local": 1.0, "remote": 0.45, "computed": 0.0}
TIER_HATCH = {"local": "", "remote": "", "computed": "///"}
PERCENTILES = (50, 95, 99)
ROLLING_REQUESTS = 20


def cache_figure(runs: Sequence[RunRecords], path: Path) -> None:
    """Write the figure of `runs` to `path` as PNG. Raises `ValueError` if none of them has an answer."""
    runs = answered(runs)
    frames = [metrics.frame(run.responses) for run in runs]
    colours = run_colours(runs)
    with four_panels(path) as (figure, ((tokens, latency), (capacity, hits))):
        _draw_tokens(tokens, runs, frames, colours)
        _draw_latency(latency, runs, frames, colours)
        _draw_capacity(capacity, runs, frames, colours)
        _draw_hits(hits, runs, frames, colours)
        for axes in (capacity, hits):
            _draw_phases(axes, runs[0])
        head(figure, "Sizing policies of the local KV cache", runs, colours, _caption(runs))


def _caption(runs: Sequence[RunRecords]) -> str:
    job = runs[0].manifest.job
    return caption(
        runs,
        f"parallelism {job.parallelism}",
        f"micro-batches of {job.batching.batch_size} or {job.batching.max_wait_ms:g} ms",
        f"chunks of {job.cache.chunk_tokens} tokens",
    )


def run_colours(runs: Sequence[RunRecords]) -> list[str]:
    """The colour of each run. A strategy's first run has the strategy's own colour; every other run an unused one."""
    others = iter(OTHER_COLOURS * (1 + len(runs) // len(OTHER_COLOURS)))
    strategies = [run.manifest.job.cache.sizing.strategy for run in runs]
    return [
        COLOURS[strategy] if strategy in COLOURS and strategy not in strategies[:place] else next(others)
        for place, strategy in enumerate(strategies)
    ]


def _draw_tokens(axes: Any, runs: Sequence[RunRecords], frames: Sequence[pd.DataFrame], colours: Sequence[str]) -> None:
    for place, (answers, colour) in enumerate(zip(frames, colours, strict=True)):
        bottom = 0.0
        for tier in TIERS:
            share = token_share_percent(answers, tier)
            face = (colour, TIER_ALPHA[tier])
            axes.bar(place, share, 0.6, bottom=bottom, facecolor=face, edgecolor=colour, hatch=TIER_HATCH[tier], lw=1)
            if share >= 4:
                _label(axes, place, bottom + share / 2, f"{share:.1f} %", tier)
            bottom += share
    axes.set_xticks(range(len(runs)), [run.manifest.variant for run in runs])
    axes.set_ylim(0, 100)
    axes.set_ylabel("share of prompt tokens (%)")
    axes.set_title("a   Origin of prompt tokens", pad=26)
    handles = [
        Patch(facecolor=("#444444", TIER_ALPHA[tier]), edgecolor="#444444", hatch=TIER_HATCH[tier], label=label)
        for tier, label in zip(TIERS, ("local", "remote (Redis)", "computed"), strict=True)
    ]
    legend(axes, handles)


def _label(axes: Any, x: float, y: float, text: str, tier: str) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5} if tier == "computed" else None
    axes.text(x, y, text, ha="center", va="center", color="white" if tier == "local" else "black", bbox=box)


def _draw_latency(
    axes: Any, runs: Sequence[RunRecords], frames: Sequence[pd.DataFrame], colours: Sequence[str]
) -> None:
    width = 0.8 / len(runs)
    for place, (answers, colour) in enumerate(zip(frames, colours, strict=True)):
        values = [metrics.percentile(answers, "e2e_ms", percent) for percent in PERCENTILES]
        at = np.arange(len(PERCENTILES)) + (place - (len(runs) - 1) / 2) * width
        bars = axes.bar(at, values, width * 0.92, color=colour)
        axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=10 if len(runs) <= 4 else 8)
    axes.set_xticks(range(len(PERCENTILES)), [f"p{percent}" for percent in PERCENTILES])
    axes.margins(y=0.12)
    axes.set_ylabel("created to answered (ms)")
    axes.set_title("b   Latency", pad=26)


def _draw_capacity(
    axes: Any, runs: Sequence[RunRecords], frames: Sequence[pd.DataFrame], colours: Sequence[str]
) -> None:
    for extra, run, answers, colour in zip(_widening(runs), runs, frames, colours, strict=True):
        for column, style, width in (("cache_capacity_chunks", "-", 2.2), ("cache_used_chunks", ":", 1.6)):
            seconds, chunks = summed_over_slots(answers, column, begin_ms(run))
            axes.step(seconds, chunks, style, where="post", color=colour, lw=width + (extra if style == "-" else 0))
    axes.set_ylim(bottom=0)
    axes.margins(y=0.1)
    axes.set_ylabel("chunks, all slots")
    axes.set_xlabel("time since the first request (s)")
    axes.set_title("c   Local tier over time", pad=26)
    lines = (("-", 2.2, "capacity"), (":", 1.6, "in use"))
    legend(
        axes, [Line2D([], [], color="#444444", ls=style, lw=width, label=name) for style, width, name in lines], 1.085
    )


def _widening(runs: Sequence[RunRecords]) -> list[float]:
    """Extra line width of each run in points. Lines drawn first are wider, so that equal runs all stay visible."""
    return [1.6 * (len(runs) - 1 - place) for place in range(len(runs))]


def _draw_hits(axes: Any, runs: Sequence[RunRecords], frames: Sequence[pd.DataFrame], colours: Sequence[str]) -> None:
    for extra, run, answers, colour in zip(_widening(runs), runs, frames, colours, strict=True):
        seconds, percent = rolling_local_hit_rate(answers, ROLLING_REQUESTS, begin_ms(run))
        axes.plot(seconds, percent, color=colour, lw=2 + extra)
    axes.set_ylim(0, 100)
    axes.set_ylabel("local token hit rate (%)")
    axes.set_xlabel("time since the first request (s)")
    axes.set_title(f"d   Local token hit rate, last {ROLLING_REQUESTS} requests", pad=26)


def _draw_phases(axes: Any, run: RunRecords) -> None:
    """Draw the phases as bands. Their names are between axes and title, where no line crosses them.

    All runs have the same schedule.
    """
    axes.set_xlim(left=0)
    for place, stretch in enumerate(phases(run)):
        if place % 2 == 0:
            axes.axvspan(stretch.begin_s, stretch.end_s, color="#f1f1f1", lw=0, zorder=-1)
        axes.text(
            (stretch.begin_s + stretch.end_s) / 2,
            1.015,
            stretch.name,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=9.5,
            color="#555555",
        )

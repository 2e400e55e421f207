"""How much memory sizing policies need for their hits, compared with the best fixed capacity in hindsight.

    python -m benchmarks.sizing_policies

runs the cache manager over generated loads in virtual time, without a model. A policy's cost is its mean capacity over
time. It is compared with the smallest fixed capacity, known only in hindsight, that has as many hits, or that reaches
the policy's target if it has one. No time is measured.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from pydantic import Field
from rich.console import Console

from benchmarks.command import progress, stated
from cache.config import MrcGoal, SizingConfig
from cache.eviction import make_eviction
from cache.sizing import make_sizing
from core.config import Config
from core.errors import exit_on_user_error
from experiments.config import ROOT
from experiments.figures import STYLE
from experiments.lab.config import Drive, LabConfig, LoadFormat
from experiments.lab.drive import ReplayResult, run
from experiments.lab.load import make_load
from experiments.report import write_csv
from workloads.block_trace import BlockRequest
from workloads.config import PhasesConfig, WorkloadConfig

LEAST, GREATEST = 16, 4096
"""Bounds of the policies' capacities, in chunks."""
PARTS = (0.7, 0.8, 0.9, 0.95)
"""Targets of MRC, over the hit ratio of an infinite cache."""
PRICES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
BEGINNINGS = (64, 128, 256, 512, 1024)
"""Initial capacities of FLUID and FREQUENCY."""
COLOURS = {"FLUID": "#d55e00", "FREQUENCY": "#009e73", "MRC, target": "#cc79a7", "MRC, price": "#0072b2"}
MARKERS = {"FLUID": "s", "FREQUENCY": "D", "MRC, target": "*", "MRC, price": "o"}


class StudyConfig(Config):
    """Compares sizing policies on generated loads."""

    seed: int = Field(default=0, ge=0, description="random seed of the loads")
    out: Path = Field(
        default=ROOT / "results" / "policy_lab" / "sizing_policies.csv", description="CSV; the figure is put beside it"
    )


@dataclass(frozen=True)
class Case:
    """One policy with its settings."""

    policy: str
    setting: str
    sizing: SizingConfig
    target: float | None = None


def loads(seed: int) -> dict[str, LabConfig]:
    def phases(requests: int) -> LabConfig:
        made = PhasesConfig(base_interval_ms=600.0)
        load = WorkloadConfig(requests=requests, seed=seed, max_prompt_tokens=1024, phases=made)
        return LabConfig(format=LoadFormat.PHASES, workload=load)

    bursts = LabConfig(format=LoadFormat.BURSTS, workload=WorkloadConfig(requests=2000, seed=seed))
    return {"phases, 200 requests": phases(200), "phases, 2,000 requests": phases(2000), "bursts": bursts}


def cases(attainable: float) -> Iterator[Case]:
    def sizing(strategy: str, beginning: int, **changes: Any) -> SizingConfig:
        bounds = {"min_capacity_chunks": LEAST, "max_capacity_chunks": GREATEST}
        return SizingConfig.model_validate({"strategy": strategy, "capacity_chunks": beginning} | bounds | changes)

    for strategy in ("FLUID", "FREQUENCY"):
        for beginning in BEGINNINGS:
            yield Case(strategy, f"from {beginning} chunks", sizing(strategy, beginning))
    for part in PARTS:
        target = part * attainable
        yield Case(
            "MRC, target",
            f"{part:g} of what is attainable",
            sizing("MRC", 64, mrc_target_hit_rate=target),
            target,
        )
    for price in PRICES:
        priced = sizing("MRC", 64, mrc_goal=MrcGoal.PRICE, mrc_price=price)
        yield Case("MRC, price", f"{price:g} hits a chunk-second", priced)


def serve(load: Sequence[BlockRequest], sizing: SizingConfig) -> ReplayResult:
    return run(load, make_eviction("LRU"), make_sizing(sizing), Drive.REQUEST)


class Fixed:
    """Hit ratios of fixed capacities. Under LRU more chunks never have fewer hits."""

    def __init__(self, load: Sequence[BlockRequest]) -> None:
        self._load = load
        self._ratios: dict[int, float] = {}

    def ratio(self, capacity: int) -> float:
        """Prefix hits over all accesses."""
        if capacity not in self._ratios:
            self._ratios[capacity] = hit_ratio(serve(self._load, SizingConfig(capacity_chunks=capacity)))
        return self._ratios[capacity]

    def smallest(self, ratio: float) -> int:
        """Return the smallest capacity with this hit ratio, at most `GREATEST`."""
        low, high = 1, GREATEST
        while low < high:
            middle = (low + high) // 2
            if self.ratio(middle) >= ratio:
                high = middle
            else:
                low = middle + 1
        return low

    @property
    def line(self) -> list[tuple[int, float]]:
        return sorted(self._ratios.items())


def hit_ratio(outcome: ReplayResult) -> float:
    return outcome.prefix_hits / outcome.accesses


def study(name: str, load: Sequence[BlockRequest], fixed: Fixed) -> Iterator[dict[str, Any]]:
    """Yield one row per case."""
    for case in cases(fixed.ratio(GREATEST)):
        outcome = serve(load, case.sizing)
        best = fixed.smallest(case.target or hit_ratio(outcome))
        yield {
            "load": name,
            "policy": case.policy,
            "setting": case.setting,
            "target_hit_ratio": case.target,
            "prefix_hit_ratio": hit_ratio(outcome),
            "mean_capacity_chunks": outcome.mean_capacity_chunks,
            "peak_capacity_chunks": outcome.peak_capacity_chunks,
            "chunk_seconds": outcome.chunk_ms / 1000,
            "best_static_chunks": best,
            "over_best_static": outcome.mean_capacity_chunks / best,
        }


def draw(found: pd.DataFrame, fixed: dict[str, Fixed], path: Path) -> None:
    """Draw hits over mean capacity: fixed capacities as a line, policies as points. Above the line is better."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(fixed), figsize=(5.4 * len(fixed), 5.2), squeeze=False)
        for plot, (name, hindsight) in zip(axes[0], fixed.items(), strict=True):
            capacities, ratios = zip(*hindsight.line, strict=True)
            plot.plot(capacities, 100 * np.asarray(ratios), color="black", lw=1.5, label="fixed, in hindsight")
            for policy, colour in COLOURS.items():
                points = found[(found["load"] == name) & (found["policy"] == policy)]
                plot.scatter(
                    points["mean_capacity_chunks"],
                    100 * points["prefix_hit_ratio"],
                    color=colour,
                    marker=MARKERS[policy],
                    s=90 if policy == "MRC, target" else 42,
                    label=policy,
                    zorder=3,
                )
            for target in found[found["load"] == name]["target_hit_ratio"].dropna():
                plot.axhline(100 * target, color=COLOURS["MRC, target"], lw=0.7, dashes=(2, 3))
            plot.set_xscale("log")
            plot.set_xlabel("mean capacity over time (chunks)")
            plot.set_title(name, pad=10)
        axes[0][0].set_ylabel("prefix hits (% of accesses)")
        axes[0][-1].legend(loc="lower right")
        figure.tight_layout()
        figure.savefig(path, dpi=130)
        plt.close(figure)


def main() -> None:
    config = stated(StudyConfig, "benchmarks.sizing_policies", (__doc__ or "").splitlines()[0])
    console = Console(highlight=False)
    rows: list[dict[str, Any]] = []
    fixed: dict[str, Fixed] = {}
    with progress(console) as bar:
        for name, lab in loads(config.seed).items():
            load = list(make_load(lab)())
            fixed[name] = Fixed(load)
            grid = np.unique(np.geomspace(LEAST, GREATEST, 24).astype(int))
            task = bar.add_task(name, total=len(grid) + len(list(cases(0.5))))
            for capacity in grid:
                fixed[name].ratio(int(capacity))
                bar.advance(task)
            for row in study(name, load, fixed[name]):
                rows.append(row)
                bar.advance(task)
    found = pd.DataFrame(rows)
    write_csv(found, config.out)
    draw(found, fixed, config.out.with_suffix(".png"))
    console.print(found[["load", "policy", "setting", "prefix_hit_ratio", "over_best_static"]].to_string(index=False))
    console.print(f"written to {config.out} and {config.out.with_suffix('.png').name}")


if __name__ == "__main__":
    exit_on_user_error(main)

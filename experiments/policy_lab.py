"""Runs eviction and sizing policies of the local KV cache on a trace, in virtual time, without a model, with bounds."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Console

from core.errors import exit_on_user_error
from experiments.config import Command, check_writable
from experiments.interrupts import EXIT_STATUS, Interrupted, interruptible
from experiments.lab.config import LabConfig
from experiments.lab.figure import over_capacity, over_time
from experiments.lab.load import make_load
from experiments.lab.table import BOUNDS, SHOWN, LabRow, rows, steps, table
from experiments.report import show, write_csv
from workloads.progress import progress_bar

_NOT_HERE = "the policy lab has no engine and no broker; leave it out"
_BY_FORMAT = "choose the load with --format"

COMMAND = Command(
    LabConfig,
    "scripts/run_policy_lab.sh",
    __doc__ or "",
    own_defaults={},
    decided={
        "strategy": "name the policies to compare with --sizing",
        "capacity_chunks": "name the capacities to compare with --capacity",
        "min_capacity_chunks": "give it as a share of the capacity with --least-capacity",
        "max_capacity_chunks": "give it as a multiple of the capacity with --greatest-capacity",
        "workload": _BY_FORMAT,
        "vocab_size": _NOT_HERE,
        "output_scale": _NOT_HERE,
        "long_prompts": _NOT_HERE,
        "block_tokens": "the policy lab keeps the blocks of a trace; give their size with --trace-block-tokens",
        "shared_blocks": _NOT_HERE,
        "prompt_scale": _NOT_HERE,
        "rate_per_s": _BY_FORMAT,
        "arrivals": _BY_FORMAT,
        "prompt_tokens": _BY_FORMAT,
        "answer_tokens": _BY_FORMAT,
        "length_cv": _BY_FORMAT,
        "even_over": _BY_FORMAT,
    },
)


def main() -> None:
    """Run the policy lab with the options of `sys.argv`."""
    config = COMMAND.parse()
    left_out: Counter[str] = Counter()
    load = make_load(config, left_out)
    check_writable(config.out.parent)
    trace = config.workload.replay.trace
    name = config.format.value if trace is None else trace.name
    try:
        with interruptible(), progress_bar() as progress:
            task = progress.add_task("", total=steps(config))
            results = []
            for row in rows(config, load, name, lambda doing: progress.update(task, description=doing)):
                results.append(row)
                progress.advance(task)
    except Interrupted:
        print("interrupted: nothing was written", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_STATUS)
    _report(config, results, left_out)


def _report(config: LabConfig, results: Sequence[LabRow], left_out: Mapping[str, int]) -> None:
    found = table(results)
    write_csv(found, config.out)
    made = {"CSV": config.out}
    if config.figures:
        if any(row.sizing == "static" and row.eviction not in BOUNDS for row in results):
            made["hits"] = config.out.with_suffix(".png")
            over_capacity(results, made["hits"])
        if any(row.moves for row in results):
            made["sizes"] = config.out.with_name(f"{config.out.stem}_over_time.png")
            over_time(results, made["sizes"])
    for column in ("hit", "prefix_hit", "token_hit"):
        found[f"{column}_percent"] = 100 * found[f"{column}_ratio"]
    show(found, SHOWN)
    console = Console(highlight=False, soft_wrap=True)
    for name, path in made.items():
        console.print(f"{name + ':':8}{path}", markup=False)
    for reason, count in left_out.items():
        console.print(f"{reason.replace('_', ' ')}: {count:,}", markup=False)


if __name__ == "__main__":
    exit_on_user_error(main)

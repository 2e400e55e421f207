"""Compares sizing policies of the local KV cache on one load: the same requests, in the same order, from cold."""

import datetime
import sys

from core.errors import exit_on_user_error
from experiments.config import ROOT, CacheExperimentConfig, cache_variants, parse
from experiments.experiment import Experiment, carry_out, rebuild
from experiments.figures import cache_figure
from experiments.interrupts import EXIT_STATUS, Interrupted, interruptible
from experiments.metrics import table


def main() -> None:
    """Run the experiment that `sys.argv` states."""
    config = parse(CacheExperimentConfig, "scripts/run_cache_experiments.sh", __doc__ or "")
    run_id = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    experiment = Experiment(
        name="cache_experiments",
        pipeline=ROOT / "pipelines" / "cache_experiment.py",
        variants=cache_variants(config, run_id),
        workload=config.workload,
        out=config.out,
        table=table,
        figure=cache_figure,
    )
    try:
        with interruptible():
            if config.run.from_raw is not None:
                rebuild(experiment, config.run.from_raw)
            else:
                carry_out(experiment, config.run, run_id)
    except Interrupted:
        print("interrupted: the job is cancelled, what was started is stopped", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_STATUS)


if __name__ == "__main__":
    exit_on_user_error(main)

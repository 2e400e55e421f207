"""An experiment is data: variants of a job, a load, and the functions that turn records into results. This runs it."""

import datetime
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from kafka.errors import KafkaError
from rich.console import Console

from core.credentials import in_one_line
from core.errors import UserError
from experiments.config import RunConfig, Variant, check_writable, with_addresses, with_profile_found
from experiments.interrupts import EXIT_STATUS, Interrupted, interruptible
from experiments.records import RunRecords, read_runs, write_run
from experiments.report import Shown, notes, show, write_csv
from experiments.run import Setting, run_variant
from experiments.services import services
from operators.config import JobConfig
from operators.job_files import with_absolute_paths
from workloads.catalogue import make_workload
from workloads.config import WorkloadConfig


@dataclass(frozen=True)
class Experiment:
    """The parts of one experiment."""

    name: str
    """Prefix of its files: `<name>_<run id>.csv` and `.png`."""
    pipeline: Path
    variants: Sequence[Variant]
    workload: WorkloadConfig
    out: Path
    table: Callable[[Sequence[RunRecords]], pd.DataFrame]
    shown: Sequence[Shown]
    """Columns of the table on the screen."""
    figure: Callable[[Sequence[RunRecords], Path], None]
    backlog: bool = False
    """Send the whole load at once instead of on its schedule."""
    notes: Callable[[Sequence[RunRecords]], Sequence[str]] = lambda runs: ()
    """Sentences about limits of this experiment's numbers, besides those that hold for every experiment."""


def new_run_id() -> str:
    """Return the local time as the name of a run."""
    return datetime.datetime.now().strftime("%Y%m%d-%H%M%S")


def execute(experiment: Experiment, run: RunConfig, run_id: str) -> None:
    """Run the experiment, or rebuild its results if `run` names raw records.

    An interruption stops what was started and ends the process.
    """
    try:
        with interruptible():
            if run.from_raw is not None:
                rebuild(experiment, run.from_raw)
            else:
                carry_out(experiment, run, run_id)
    except Interrupted:
        print("interrupted: the job is cancelled, what was started is stopped", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_STATUS)


def carry_out(experiment: Experiment, run: RunConfig, run_id: str) -> None:
    """Run every variant on the same load, write raw records, CSV and figure, and show the table.

    All that can be checked is checked before anything is started. Raises `UserError`.
    """
    variants = [
        Variant(variant.name, with_profile_found(with_absolute_paths(variant.job))) for variant in experiment.variants
    ]
    workload = make_workload(experiment.workload)
    # Reading the first request opens a trace, so a wrong path fails now.
    if next(iter(workload), None) is None:
        raise UserError("--workload: it has no requests with these options; allow longer prompts or give another trace")
    check_writable(experiment.out)
    raw = experiment.out / "raw" / run_id
    runs = []
    with services(run, largest_job(variants)) as found:
        setting = Setting(
            experiment=experiment.name,
            run_id=run_id,
            pipeline=experiment.pipeline,
            flink=found.flink,
            run=run,
            workload_config=experiment.workload,
            workload=workload,
            backlog=experiment.backlog,
        )
        for position, variant in enumerate(variants):
            job = with_addresses(variant.job, brokers=found.brokers, redis_url=found.redis_url)
            try:
                records = run_variant(setting, Variant(variant.name, job), position)
            except KafkaError as error:
                raise UserError(f"Kafka at {found.brokers} failed: {in_one_line(error)}") from None
            except UserError as error:
                raise UserError(f"{variant.name}: {error}") from None
            write_run(raw, records)
            runs.append(records)
    finish(experiment, runs, raw, run_id)


def rebuild(experiment: Experiment, raw: Path) -> None:
    """Make CSV and figure again from the records below `raw`, with the file names of the run.

    Raises `UserError` if records are broken or belong to another experiment.
    """
    runs = read_runs(raw)
    if others := {run.manifest.experiment for run in runs} - {experiment.name}:
        raise UserError(f"--from-raw: {raw} holds records of {', '.join(sorted(others))}, not of {experiment.name}")
    check_writable(experiment.out)
    finish(experiment, runs, raw, runs[0].manifest.run_id)


def finish(experiment: Experiment, runs: Sequence[RunRecords], raw: Path, run_id: str) -> None:
    """Make CSV, figure and table from the records."""
    stem = f"{experiment.name}_{run_id.replace('-', '_')}"
    csv, png = experiment.out / f"{stem}.csv", experiment.out / f"{stem}.png"
    results = experiment.table(runs)
    write_csv(results, csv)
    made = {"CSV": csv}
    if any(run.responses for run in runs):
        experiment.figure(runs, png)
        made["figure"] = png
    show(results, experiment.shown, [*notes(runs), *experiment.notes(runs)])
    console = Console(highlight=False, soft_wrap=True)
    for name, path in (made | {"raw": raw}).items():
        console.print(f"{name + ':':8}{path}", markup=False)


def largest_job(variants: Sequence[Variant]) -> JobConfig:
    """Return the job that needs the most slots."""
    return max((variant.job for variant in variants), key=lambda job: job.parallelism)

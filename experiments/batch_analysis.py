"""Compares batch sizes and continuous batching on one paced load: what does waiting for a batch cost and gain?"""

from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from core.config import Config
from core.errors import exit_on_user_error
from experiments.batch_figure import batch_figure
from experiments.batch_metrics import SHOWN, notes, table
from experiments.config import ROOT, Command, RunConfig, Variant, distinct_numbers, in_own_space
from experiments.experiment import Experiment, execute, new_run_id
from operators.config import Batching, JobConfig
from workloads.config import WorkloadConfig

MOST = 1024
"""Maximum of `operators.config.BatchingConfig.batch_size`."""


class BatchAnalysisConfig(Config):
    """Compares batch sizes and continuous batching on one load."""

    batch_sizes: str = Field(
        default="1,2,4,8", min_length=1, description="sizes of micro-batches to compare, separated by commas"
    )
    continuous: bool = Field(default=True, description="compare continuous batching too")
    out: Path = Field(default=ROOT / "results" / "batch_analysis", description="folder of the results")
    run: RunConfig = RunConfig()
    job: JobConfig = JobConfig()
    workload: WorkloadConfig = WorkloadConfig()

    @field_validator("batch_sizes")
    @classmethod
    def _numbers(cls, value: str) -> str:
        return ",".join(map(str, distinct_numbers(value, MOST)))

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if max(self.sizes) > self.job.engine.max_running:
            raise ValueError(
                f"batch_sizes: {max(self.sizes)} is above max_running, {self.job.engine.max_running}; "
                "raise that or drop the size"
            )
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        return distinct_numbers(self.batch_sizes, MOST)


COMMAND = Command(
    BatchAnalysisConfig,
    "scripts/run_batch_analysis.sh",
    __doc__ or "",
    own_defaults={
        "workload": "independent",
        "requests": 100,
        # On one core with the default model: above the capacity of single requests, below that of batches of 8.
        "rate_per_s": 3.0,
        "prompt_tokens": 32,
        "answer_tokens": 32,
        # Real answers differ in length, and a micro-batch takes as long as its longest answer.
        "length_cv": 0.6,
        "max_new_tokens": 128,
        # One slot on one core: Kafka and Flink need the other core, and would distort an engine that shares its cores.
        "parallelism": 1,
        "threads": 1,
        "placement": "session",
        # Requests share nothing, so there is nothing to reuse.
        "cache": False,
        "remote": False,
    },
    decided={
        "batching": "each row sets it; choose the rows with --batch-sizes and --no-continuous",
        "batch_size": "each row sets it; name the sizes with --batch-sizes",
    },
)


def variants(config: BatchAnalysisConfig, run_id: str) -> tuple[Variant, ...]:
    """Return one job per batch size and one with continuous batching, otherwise equal."""
    found = [
        _variant(config.job, f"batch_{size}", run_id, {"batching": Batching.MICRO, "batch_size": size})
        for size in config.sizes
    ]
    if config.continuous:
        found.append(_variant(config.job, "continuous", run_id, {"batching": Batching.CONTINUOUS}))
    return tuple(found)


def _variant(job: JobConfig, name: str, run_id: str, batching: dict[str, object]) -> Variant:
    job = job.model_copy(update={"batching": job.batching.model_copy(update=batching)})
    return Variant(name, in_own_space(job, f"batch-{run_id}-{name}"))


def main() -> None:
    """Run the experiment with the options of `sys.argv`."""
    config, run_id = COMMAND.parse(), new_run_id()
    experiment = Experiment(
        name="batch_analysis",
        pipeline=ROOT / "pipelines" / "inference.py",
        variants=variants(config, run_id),
        workload=config.workload,
        out=config.out,
        table=table,
        shown=SHOWN,
        figure=batch_figure,
        notes=notes,
    )
    execute(experiment, config.run, run_id)


if __name__ == "__main__":
    exit_on_user_error(main)

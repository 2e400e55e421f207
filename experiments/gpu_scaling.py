"""Compares numbers of slots on one backlog: how does throughput grow with the number of devices?"""

import math
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from core.config import Config
from core.errors import exit_on_user_error
from experiments.config import ROOT, Command, RunConfig, Variant, distinct_numbers, in_own_space
from experiments.experiment import Experiment, execute, new_run_id
from experiments.scaling_figure import scaling_figure
from experiments.scaling_metrics import SHOWN, notes, table
from operators.config import JobConfig
from workloads.config import WorkloadConfig

MOST = 128
"""Maximum of `operators.config.JobConfig.parallelism`."""
MOST_TURNS = 1024
"""Maximum of `workloads.config.IndependentConfig.even_over`."""


class GpuScalingConfig(Config):
    """Compares parallelisms on one load."""

    parallelisms: str = Field(
        default="1,2,4", min_length=1, description="numbers of slots to compare, separated by commas"
    )
    out: Path = Field(default=ROOT / "results" / "gpu_scaling", description="folder of the results")
    run: RunConfig = RunConfig()
    job: JobConfig = JobConfig()
    workload: WorkloadConfig = WorkloadConfig()

    @field_validator("parallelisms")
    @classmethod
    def _numbers(cls, value: str) -> str:
        return ",".join(map(str, distinct_numbers(value, MOST)))

    @model_validator(mode="after")
    def _can_be_even(self) -> Self:
        if not self._evenness_given and math.lcm(*self.slots) > MOST_TURNS:
            raise ValueError(
                f"parallelisms: their least common multiple, {math.lcm(*self.slots)}, is above {MOST_TURNS}, so "
                "no load is even over each of them; choose others, or give even_over"
            )
        return self

    @property
    def slots(self) -> tuple[int, ...]:
        return distinct_numbers(self.parallelisms, MOST)

    @property
    def even_workload(self) -> WorkloadConfig:
        """The load, spread evenly over the slots of every variant unless `even_over` is given."""
        if self._evenness_given:
            return self.workload
        independent = self.workload.independent.model_copy(update={"even_over": math.lcm(*self.slots)})
        return self.workload.model_copy(update={"independent": independent})

    @property
    def _evenness_given(self) -> bool:
        return "even_over" in self.workload.independent.model_fields_set


COMMAND = Command(
    GpuScalingConfig,
    "scripts/run_gpu_scaling.sh",
    __doc__ or "",
    own_defaults={
        "workload": "independent",
        "requests": 240,
        "prompt_tokens": 64,
        "answer_tokens": 32,
        # Equal lengths and fixed slots of sessions, so that results depend on devices and not on chance.
        "length_cv": 0.0,
        "placement": "session",
        # Each slot has one core, at every parallelism.
        "threads": 1,
        # Requests share nothing, so there is nothing to reuse; a simulated device cannot reuse anyway.
        "cache": False,
        "remote": False,
    },
    decided={"parallelism": "each row sets it; name the numbers with --parallelisms"},
)


def variants(config: GpuScalingConfig, run_id: str) -> tuple[Variant, ...]:
    """Return one job per parallelism, otherwise equal."""
    return tuple(
        Variant(
            f"parallelism_{slots}",
            in_own_space(config.job.model_copy(update={"parallelism": slots}), f"scaling-{run_id}-{slots}"),
        )
        for slots in config.slots
    )


def main() -> None:
    """Run the experiment with the options of `sys.argv`."""
    config, run_id = COMMAND.parse(), new_run_id()
    experiment = Experiment(
        name="gpu_scaling",
        pipeline=ROOT / "pipelines" / "inference.py",
        variants=variants(config, run_id),
        workload=config.even_workload,
        backlog=True,
        out=config.out,
        table=table,
        shown=SHOWN,
        figure=scaling_figure,
        notes=notes,
    )
    execute(experiment, config.run, run_id)


if __name__ == "__main__":
    exit_on_user_error(main)

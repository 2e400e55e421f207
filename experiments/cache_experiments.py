"""Compares sizing policies of the local KV cache on one load: the same requests, in the same order, from cold."""

from pathlib import Path

from pydantic import Field, field_validator

from core.config import Config, JobConfig, Strategy
from core.errors import exit_on_user_error
from experiments.cache_figure import cache_figure
from experiments.cache_metrics import SHOWN, table
from experiments.config import ROOT, Command, RunConfig, Variant, in_own_space
from experiments.experiment import Experiment, execute, new_run_id
from workloads.config import WorkloadConfig


class CacheExperimentConfig(Config):
    """Compares sizing policies of the local tier on one load."""

    strategies: str = Field(
        default=",".join(Strategy), min_length=1, description="sizing policies to compare, separated by commas"
    )
    out: Path = Field(default=ROOT / "results" / "cache_experiments", description="folder of the results")
    run: RunConfig = RunConfig()
    job: JobConfig = JobConfig()
    workload: WorkloadConfig = WorkloadConfig()

    @field_validator("strategies")
    @classmethod
    def _known(cls, value: str) -> str:
        names = [name.strip().upper() for name in value.split(",") if name.strip()]
        unknown = [name for name in names if name not in set(Strategy)]
        if unknown or not names:
            raise ValueError(f"unknown strategy {', '.join(unknown) or repr(value)}; choose of {', '.join(Strategy)}")
        if len(set(names)) < len(names):
            raise ValueError("a strategy is named twice; name each once")
        return ",".join(names)

    @property
    def chosen(self) -> tuple[Strategy, ...]:
        return tuple(Strategy(name) for name in self.strategies.split(","))


COMMAND = Command(
    CacheExperimentConfig,
    "scripts/run_cache_experiments.sh",
    __doc__ or "",
    own_defaults={
        # About 3 requests/s: two CPU cores keep up with that on the default model: latency is not all queueing.
        "base_interval_ms": 600.0,
        "max_new_tokens": 16,
        "max_prompt_tokens": 1024,
        # What is compared is the cache: nothing else may depend on when a request comes.
        "batching": "micro",
        "placement": "session",
    },
    decided={"strategy": "the experiment sets it; name the ones to compare with --strategies"},
)


def with_strategy(job: JobConfig, strategy: Strategy) -> JobConfig:
    sizing = job.cache.sizing.model_copy(update={"strategy": strategy})
    return job.model_copy(update={"cache": job.cache.model_copy(update={"sizing": sizing})})


def variants(config: CacheExperimentConfig, run_id: str) -> tuple[Variant, ...]:
    """One job for each strategy, equal in all else."""
    return tuple(
        Variant(strategy, in_own_space(with_strategy(config.job, strategy), f"cache-{run_id}-{strategy.lower()}"))
        for strategy in config.chosen
    )


def main() -> None:
    """Run the experiment that `sys.argv` states."""
    config, run_id = COMMAND.parse(), new_run_id()
    experiment = Experiment(
        name="cache_experiments",
        pipeline=ROOT / "pipelines" / "cache_experiment.py",
        variants=variants(config, run_id),
        workload=config.workload,
        out=config.out,
        table=table,
        shown=SHOWN,
        figure=cache_figure,
    )
    execute(experiment, config.run, run_id)


if __name__ == "__main__":
    exit_on_user_error(main)

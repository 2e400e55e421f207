"""Compares sizing and eviction policies of the local KV cache: the same requests, in order, from a cold cache."""

from pathlib import Path

from pydantic import Field, field_validator

from cache.registry import EVICTION, SIZING
from core.config import Config
from core.errors import exit_on_user_error
from experiments.cache_figure import cache_figure
from experiments.cache_metrics import SHOWN, table
from experiments.config import ROOT, Command, RunConfig, Variant, distinct_names, in_own_space
from experiments.experiment import Experiment, execute, new_run_id
from operators.config import JobConfig
from workloads.config import WorkloadConfig


class CacheExperimentConfig(Config):
    """Compares sizing and eviction policies of the local tier on one load."""

    strategies: str = Field(
        default=",".join(SIZING), min_length=1, description="sizing policies to compare, separated by commas"
    )
    eviction: str = Field(
        default="LRU",
        min_length=1,
        description=f"eviction policies to compare, of {', '.join(EVICTION)}, separated by commas",
    )
    out: Path = Field(default=ROOT / "results" / "cache_experiments", description="folder of the results")
    run: RunConfig = RunConfig()
    job: JobConfig = JobConfig()
    workload: WorkloadConfig = WorkloadConfig()

    @field_validator("strategies")
    @classmethod
    def _known_strategies(cls, value: str) -> str:
        return ",".join(distinct_names(value, SIZING, "strategy"))

    @field_validator("eviction")
    @classmethod
    def _known_evictions(cls, value: str) -> str:
        return ",".join(distinct_names(value, EVICTION, "eviction policy"))

    @property
    def chosen(self) -> tuple[str, ...]:
        return distinct_names(self.strategies, SIZING, "strategy")

    @property
    def evictions(self) -> tuple[str, ...]:
        return distinct_names(self.eviction, EVICTION, "eviction policy")


COMMAND = Command(
    CacheExperimentConfig,
    "scripts/run_cache_experiments.sh",
    __doc__ or "",
    own_defaults={
        # About 3 requests/s. Two CPU cores keep up with this on the default model, so latency is not all queueing.
        "base_interval_ms": 600.0,
        "max_new_tokens": 16,
        "max_prompt_tokens": 1024,
        # Only the cache is compared, so nothing else may depend on when a request arrives.
        "batching": "micro",
        "placement": "session",
    },
    decided={"strategy": "the experiment sets it; name the ones to compare with --strategies"},
)


def with_strategy(job: JobConfig, strategy: str, eviction: str = "LRU") -> JobConfig:
    sizing = job.cache.sizing.model_copy(update={"strategy": strategy})
    return job.model_copy(update={"cache": job.cache.model_copy(update={"sizing": sizing, "eviction": eviction})})


def variants(config: CacheExperimentConfig, run_id: str) -> tuple[Variant, ...]:
    """Return one job per strategy and eviction policy, otherwise equal.

    If there are several eviction policies, a job is named by both.
    """
    made = []
    for strategy in config.chosen:
        for eviction in config.evictions:
            name = strategy if len(config.evictions) == 1 else f"{strategy}-{eviction}"
            job = with_strategy(config.job, strategy, eviction)
            made.append(Variant(name, in_own_space(job, f"cache-{run_id}-{name.lower()}")))
    return tuple(made)


def main() -> None:
    """Run the experiment with the options of `sys.argv`."""
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

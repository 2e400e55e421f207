"""What an experiment can be told, and the defaults in which it differs from the job that it measures."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, field_validator

from core.config import Config, JobConfig, Strategy
from core.errors import UserError
from core.options import Parser, add_options, from_options, set_own_defaults
from workloads.config import WorkloadConfig

ROOT = Path(__file__).resolve().parent.parent

C = TypeVar("C", bound=Config)


class RunConfig(Config):
    """Where an experiment runs and how long it waits; the same for every experiment."""

    flink_url: str | None = Field(
        default=None, pattern=r"^http://[^\s:/]+:\d{1,5}/?$", description="http://HOST:PORT of a Flink of your own"
    )
    stack_dir: Path = Field(
        default=ROOT / ".local" / "stack", description="folder of the local stack, used if it runs, else started"
    )
    savepoint_dir: str | None = Field(
        default=None, description="URI where Flink may put a savepoint as it drains; none: as Flink is configured"
    )
    remote: bool = Field(default=True, description="use Redis as the second tier")
    ready_timeout_s: float = Field(default=300.0, gt=0, description="longest wait for all slots to have loaded")
    idle_timeout_s: float = Field(default=120.0, gt=0, description="longest wait for the next answer")
    stop_timeout_s: float = Field(default=120.0, gt=0, description="longest wait for a drained job to end")
    from_raw: Path | None = Field(
        default=None, description="folder of a run's raw records: make CSV and figure again, run nothing"
    )


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


@dataclass(frozen=True)
class Variant:
    """One run of an experiment: a job under a name that no other variant has."""

    name: str
    job: JobConfig


OWN_DEFAULTS: Mapping[str, Any] = {
    # About 3 requests/s: two CPU cores keep up with that on the default model, so that latency is not all queueing.
    "base_interval_ms": 600.0,
    "max_new_tokens": 16,
    "max_prompt_tokens": 1024,
    # What is compared is the cache: nothing else may depend on when a request comes.
    "batching": "micro",
    "placement": "session",
}
"""Options whose default is another than the job's or the workload's own, by field name."""

DECIDED = {
    "strategy": "the experiment sets it; name the ones to compare with --strategies",
    "topic_prefix": "every run makes topics of its own; leave it out",
    "redis_namespace": "every run begins with an empty namespace of its own; leave it out",
    "consumer_group": "every run makes its own; leave it out",
    "job_name": "every run makes its own; leave it out",
    "bounded": "the load is sent while the job runs; leave it out",
}
"""Options of a job that no one but the experiment may set, with what to do instead."""


def parse(config: type[C], prog: str, description: str, arguments: list[str] | None = None) -> C:
    """The experiment that the command line states. Raises `UserError`; exits 2 on an option that does not exist."""
    parser = Parser(prog=prog, description=description)
    add_options(parser, config)
    set_own_defaults(parser, OWN_DEFAULTS)
    # argparse offers no other way to its options.
    for action in parser._actions:
        if action.dest in DECIDED:
            action.help = argparse.SUPPRESS
    options = parser.parse_args(arguments)
    for name, instead in DECIDED.items():
        if name in vars(options):
            raise UserError(f"--{name.replace('_', '-')}: {instead}")
    return from_options(config, options)


def with_addresses(job: JobConfig, *, brokers: str, redis_url: str | None) -> JobConfig:
    """`job` on these services."""
    remote = job.cache.remote.model_copy(update={"redis_url": redis_url})
    return job.model_copy(
        update={
            "kafka": job.kafka.model_copy(update={"brokers": brokers}),
            "cache": job.cache.model_copy(update={"remote": remote}),
        }
    )


def in_own_space(job: JobConfig, space: str) -> JobConfig:
    """`job` with topics, keys, consumer group and name that begin with `space`: nothing of another run is seen."""
    remote = job.cache.remote.model_copy(update={"redis_namespace": space})
    kafka = job.kafka.model_copy(update={"topic_prefix": space, "consumer_group": space})
    cache = job.cache.model_copy(update={"remote": remote})
    return job.model_copy(update={"job_name": space, "bounded": False, "kafka": kafka, "cache": cache})


def with_strategy(job: JobConfig, strategy: Strategy) -> JobConfig:
    sizing = job.cache.sizing.model_copy(update={"strategy": strategy})
    return job.model_copy(update={"cache": job.cache.model_copy(update={"sizing": sizing})})


def cache_variants(config: CacheExperimentConfig, run_id: str) -> tuple[Variant, ...]:
    """One job for each strategy, equal in all else."""
    return tuple(
        Variant(strategy, in_own_space(with_strategy(config.job, strategy), f"cache-{run_id}-{strategy.lower()}"))
        for strategy in config.chosen
    )


def check_writable(out: Path) -> None:
    """Make the folder of the results. Raises `UserError` if nothing can be written there."""
    probe = out / ".writable"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out: cannot write to {out} ({error.strerror}); choose another folder") from None

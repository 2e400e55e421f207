"""What every experiment can be told, and how a job is given services and a space of its own."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import Field

from core.config import Config
from core.errors import UserError
from core.options import Parser, add_options, from_options, set_own_defaults
from core.registry import Registry
from operators.config import JobConfig

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


@dataclass(frozen=True)
class Variant:
    """One run of an experiment: a job under a name that no other variant has."""

    name: str
    job: JobConfig


DECIDED: Mapping[str, str] = {
    "topic_prefix": "every run makes topics of its own; leave it out",
    "redis_namespace": "every run begins with an empty namespace of its own; leave it out",
    "consumer_group": "every run makes its own; leave it out",
    "job_name": "every run makes its own; leave it out",
    "bounded": "the load is sent while the job runs; leave it out",
}
"""Options of a job that no one but an experiment may set, with what to do instead."""


@dataclass(frozen=True)
class Command(Generic[C]):
    """The command line of one experiment."""

    config: type[C]
    prog: str
    description: str
    own_defaults: Mapping[str, Any]
    """Options whose default is another than the job's or the workload's own, by field name."""
    decided: Mapping[str, str]
    """Options that this experiment sets besides those of `DECIDED`, with what to do instead."""

    def parse(self, arguments: list[str] | None = None) -> C:
        """The experiment that is stated. Raises `UserError`; exits 2 on an option that does not exist."""
        parser = Parser(prog=self.prog, description=self.description)
        add_options(parser, self.config)
        set_own_defaults(parser, self.own_defaults)
        decided = {**self.decided, **DECIDED}
        # argparse offers no other way to its options.
        for action in parser._actions:
            if action.dest in decided:
                action.help = argparse.SUPPRESS
        options = parser.parse_args(arguments)
        for name, instead in decided.items():
            if name in vars(options):
                raise UserError(f"--{name.replace('_', '-')}: {instead}")
        return from_options(self.config, options)


def distinct_numbers(value: str, most: int) -> tuple[int, ...]:
    """The whole numbers of `value`, from 1 to `most` and separated by commas. Raises `ValueError` for anything else."""
    words = [word.strip() for word in value.split(",")]
    for word in words:
        if not (word.isascii() and word.isdigit() and 1 <= int(word) <= most):
            raise ValueError(f"{word!r} is no whole number from 1 to {most}; give some, separated by commas")
    numbers = tuple(int(word) for word in words)
    if len(set(numbers)) < len(numbers):
        raise ValueError("a number is named twice; name each once")
    return numbers


def distinct_names(
    value: str, registry: Registry, what: str, spelled: Callable[[str], str] = str.upper
) -> tuple[str, ...]:
    """The names in `registry` that `value` lists, in any case and separated by commas.

    Raises `ValueError` for any other name. The message calls the names `what` and writes them as `spelled` does.
    """
    known = {name.upper(): name for name in registry}
    names = [name.strip().upper() for name in value.split(",") if name.strip()]
    unknown = [spelled(name) for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"unknown {what} {', '.join(unknown) or repr(value)}; choose of {spelled(', '.join(known))}")
    if len(set(names)) < len(names):
        raise ValueError(f"a{'n' if what[0] in 'aeiou' else ''} {what} is named twice; name each once")
    return tuple(known[name] for name in names)


def with_profile_found(job: JobConfig) -> JobConfig:
    """`job` with the path of its simulated device made absolute, as jobs run elsewhere. Raises `UserError`."""
    profile = job.engine.profile
    if profile is None:
        return job
    if not profile.is_file():
        raise UserError(f"--profile: {profile} is no file; name the one that benchmarks/engine.py wrote")
    return job.model_copy(update={"engine": job.engine.model_copy(update={"profile": profile.resolve()})})


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


def check_writable(out: Path) -> None:
    """Make the folder of the results. Raises `UserError` if nothing can be written there."""
    probe = out / ".writable"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out: cannot write to {out} ({error.strerror}); choose another folder") from None

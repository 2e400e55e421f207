"""Options of every experiment, and how each job gets its services and its own topics and keys."""

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
    """Services, folders and timeouts of an experiment. Every experiment has these options."""

    flink_url: str | None = Field(
        default=None, pattern=r"^http://[^\s:/]+:\d{1,5}/?$", description="http://HOST:PORT of a Flink of your own"
    )
    stack_dir: Path = Field(
        default=ROOT / ".local" / "stack", description="folder of the local stack; it is started if it does not run"
    )
    savepoint_dir: str | None = Field(
        default=None, description="URI for the savepoint of a drained job; none: as Flink is configured"
    )
    remote: bool = Field(default=True, description="use Redis as the second tier")
    ready_timeout_s: float = Field(default=300.0, gt=0, description="maximum wait until all slots have loaded")
    idle_timeout_s: float = Field(default=120.0, gt=0, description="maximum wait for the next answer")
    stop_timeout_s: float = Field(default=120.0, gt=0, description="maximum wait until a drained job has ended")
    from_raw: Path | None = Field(
        default=None, description="folder of a run's raw records: make CSV and figure from them, run nothing"
    )


@dataclass(frozen=True)
class Variant:
    """One run of an experiment: a job and its unique name."""

    name: str
    job: JobConfig


DECIDED: Mapping[str, str] = {
    "topic_prefix": "each run makes its own topics; leave it out",
    "redis_namespace": "each run begins with its own empty namespace; leave it out",
    "consumer_group": "each run makes its own; leave it out",
    "job_name": "each run makes its own; leave it out",
    "bounded": "the load is sent while the job runs; leave it out",
}
"""Options of a job that only the experiment sets, and what to do instead."""


@dataclass(frozen=True)
class Command(Generic[C]):
    """The command line of one experiment."""

    config: type[C]
    prog: str
    description: str
    own_defaults: Mapping[str, Any]
    """Defaults that differ from those of the job and the workload, by field name."""
    decided: Mapping[str, str]
    """Options that this experiment sets besides those of `DECIDED`, and what to do instead."""

    def parse(self, arguments: list[str] | None = None) -> C:
        """Return the configuration that the options give. Raises `UserError`; exits 2 on an unknown option."""
        parser = Parser(prog=self.prog, description=self.description)
        add_options(parser, self.config)
        set_own_defaults(parser, self.own_defaults)
        decided = {**self.decided, **DECIDED}
        # argparse gives no public access to its options.
        for action in parser._actions:
            if action.dest in decided:
                action.help = argparse.SUPPRESS
        options = parser.parse_args(arguments)
        for name, instead in decided.items():
            if name in vars(options):
                raise UserError(f"--{name.replace('_', '-')}: {instead}")
        return from_options(self.config, options)


def distinct_numbers(value: str, most: int) -> tuple[int, ...]:
    """Parse distinct whole numbers from 1 to `most`, separated by commas. Raises `ValueError` for anything else."""
    words = [word.strip() for word in value.split(",")]
    for word in words:
        if not (word.isascii() and word.isdigit() and 1 <= int(word) <= most):
            raise ValueError(f"{word!r} is not a whole number from 1 to {most}; give numbers separated by commas")
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
        raise ValueError(f"unknown {what} {', '.join(unknown) or repr(value)}; choose from {spelled(', '.join(known))}")
    if len(set(names)) < len(names):
        raise ValueError(f"a{'n' if what[0] in 'aeiou' else ''} {what} is named twice; name each once")
    return tuple(known[name] for name in names)


def with_profile_found(job: JobConfig) -> JobConfig:
    """Return `job` with an absolute path of its device profile, because jobs run elsewhere. Raises `UserError`."""
    profile = job.engine.profile
    if profile is None:
        return job
    if not profile.is_file():
        raise UserError(f"--profile: {profile} is not a file; name one that benchmarks/engine.py wrote")
    return job.model_copy(update={"engine": job.engine.model_copy(update={"profile": profile.resolve()})})


def with_addresses(job: JobConfig, *, brokers: str, redis_url: str | None) -> JobConfig:
    """Return `job` with the addresses of these services."""
    remote = job.cache.remote.model_copy(update={"redis_url": redis_url})
    return job.model_copy(
        update={
            "kafka": job.kafka.model_copy(update={"brokers": brokers}),
            "cache": job.cache.model_copy(update={"remote": remote}),
        }
    )


def in_own_space(job: JobConfig, space: str) -> JobConfig:
    """Return `job` with topics, keys, consumer group and name that begin with `space`, apart from all other runs."""
    remote = job.cache.remote.model_copy(update={"redis_namespace": space})
    kafka = job.kafka.model_copy(update={"topic_prefix": space, "consumer_group": space})
    cache = job.cache.model_copy(update={"remote": remote})
    return job.model_copy(update={"job_name": space, "bounded": False, "kafka": kafka, "cache": cache})


def check_writable(out: Path) -> None:
    """Create the folder of the results. Raises `UserError` if it is not writable."""
    probe = out / ".writable"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out: cannot write to {out} ({error.strerror}); choose another folder") from None

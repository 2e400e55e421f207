"""The command behind scripts/run_chaos.sh: injects faults into the production job and accounts for every request."""

import datetime
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from kafka.errors import KafkaError
from pydantic import Field, field_validator
from redis.exceptions import RedisError
from rich.progress import TaskID
from transformers import Qwen2Config
from transformers.utils.logging import disable_progress_bar

from cache.config import CacheConfig, SizingConfig
from core.config import Config
from core.errors import UserError, exit_on_user_error
from core.options import Parser, add_options, from_options
from experiments.config import ROOT, check_writable
from experiments.interrupts import EXIT_STATUS, Interrupted, interruptible
from experiments.report import Shown, show, write_csv
from inference_service.config import EngineConfig
from local_stack import LocalStack
from operators.config import JobConfig
from operators.job_files import with_absolute_paths
from tests.chaos.figure import draw
from tests.chaos.hostile import mixed_records, under_hostile_input
from tests.chaos.load import LoadShape, Reference
from tests.chaos.scenario import SCENARIOS, OnProgress, Trial, carry_out, running_job
from tests.chaos.stack import ChaosStack, chaos_config
from tests.chaos.table import Row, failings, hostile_failings, hostile_row, row, table
from tests.inference_service.engine_helpers import LAYERS_OF_TWO, save_tiny
from workloads.progress import progress_bar

HOSTILE = "hostile"
NAMES = (*SCENARIOS, HOSTILE)
SHOWN: tuple[Shown, ...] = (
    ("scenario", "scenario", ""),
    ("requests", "requests", ","),
    ("answered", "answered", ","),
    ("dead", "dead_lettered", ","),
    ("lost", "lost", ","),
    ("twice", "duplicated", ","),
    ("wrong", "wrong", ","),
    ("recovery s", "recovery_s", ".1f"),
    ("repeated", "repeated_engine_calls", ","),
    ("slowest s", "slowest_s", ".1f"),
    ("restarts", "restarts", ","),
    ("evidence", "evidence", ""),
)


class ChaosConfig(Config):
    """Scenarios, load, and folder of the results."""

    scenarios: str = Field(default=",".join(NAMES), min_length=1, description="scenarios, separated by commas")
    requests: int = Field(default=80, ge=8, le=100_000, description="requests of a scenario; every tenth is sent twice")
    rate: float = Field(default=3.0, gt=0, le=1000, description="requests per second")
    hostile_records: int = Field(default=10_000, ge=8, le=1_000_000, description="records of hostile input")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="random seed of the load")
    model: str = Field(default="default", min_length=1, description="path or name of a causal LM; default: built here")
    checkpoint_interval_ms: int = Field(default=2000, ge=100, description="checkpoint interval of the job")
    patience_s: float = Field(default=90.0, gt=0, description="maximum wait for the next answer")
    out: Path = Field(default=ROOT / "results" / "chaos", description="folder of the results")
    dir: Path = Field(
        default=ROOT / ".local" / "chaos", description="folder of the stack; its logs stay after a failure"
    )

    @field_validator("scenarios")
    @classmethod
    def _known(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",") if name.strip()]
        if unknown := set(names) - set(NAMES):
            raise ValueError(f"unknown scenario {', '.join(sorted(unknown))}; choose from {', '.join(NAMES)}")
        if len(set(names)) < len(names) or not names:
            raise ValueError("name each scenario once, and at least one")
        return ",".join(names)

    @property
    def chosen(self) -> list[str]:
        return self.scenarios.split(",")

    @property
    def shape(self) -> LoadShape:
        return LoadShape(self.requests, self.rate, self.seed, self.patience_s)

    @property
    def job(self) -> JobConfig:
        # A small local tier, so that most reused chunks come from Redis.
        sizing = SizingConfig(capacity_chunks=8, min_capacity_chunks=8)
        return with_absolute_paths(
            JobConfig(
                parallelism=2,
                checkpoint_interval_ms=self.checkpoint_interval_ms,
                engine=EngineConfig(model=self.model, max_model_len=512, threads=1),
                cache=CacheConfig(chunk_tokens=16, sizing=sizing),
            )
        )


def main() -> None:
    """Run the command of `sys.argv`; exit with status 1 if a guarantee was broken."""
    parser = Parser(prog="scripts/run_chaos.sh", description=__doc__)
    add_options(parser, ChaosConfig)
    config = from_options(ChaosConfig, parser.parse_args())
    check_writable(config.out)
    disable_progress_bar()
    try:
        with interruptible():
            failed = run(config)
    except Interrupted:
        sys.stderr.write("interrupted: the job is cancelled, the stack is stopped\n")
        sys.exit(EXIT_STATUS)
    sys.exit(1 if failed else 0)


def run(config: ChaosConfig) -> bool:
    """Run all scenarios, write and print the results; return true if any has failed."""
    stem = f"chaos_{datetime.datetime.now():%Y%m%d_%H%M%S}"
    suite = Suite(config, config.out / stem)
    with fresh_stack(config.dir) as stack, progress_bar("{task.description:40}") as bar:
        for name in config.chosen:
            task = bar.add_task(name, total=config.hostile_records if name == HOSTILE else config.requests)

            def on_progress(what: str, count: int, name: str = name, task: TaskID = task) -> None:
                bar.update(task, description=f"{name}: {what}", completed=count)

            try:
                suite.add(name, stack, on_progress)
            except (UserError, KafkaError, RedisError) as error:
                suite.said.append(f"{name}: {' '.join(str(error).split())}")
            finally:
                stack.start_again()
            bar.update(task, description=f"{name}: done")
        if suite.said:
            shutil.copytree(stack.logs, config.dir / "log")
    suite.show()
    return bool(suite.said)


class Suite:
    """The results of the scenarios so far, written to files named `stem`."""

    def __init__(self, config: ChaosConfig, stem: Path) -> None:
        self._config = config
        self._stem = stem
        self._trials: list[Trial] = []
        self._rows: list[Row] = []
        self.said: list[str] = []
        """Problems so far, one line each."""

    def add(self, name: str, stack: ChaosStack, on_progress: OnProgress) -> None:
        """Run the scenario and write all results so far. Raises `UserError` if it cannot run."""
        result, failed = (self._hostile if name == HOSTILE else self._scenario)(name, stack, on_progress)
        self._rows.append(result)
        self.said += [f"{name}: {line}" for line in failed]
        write_csv(table(self._rows), self._stem.with_suffix(".csv"))
        if self._trials:
            draw(self._trials, self._stem.with_suffix(".png"))

    def show(self) -> None:
        kept = "Every request was answered exactly once, and as the engine alone answers it."
        show(table(self._rows), SHOWN, self.said or [kept])
        sys.stdout.write(f"written to {self._stem}.csv and .png\n")
        if self.said:
            sys.stdout.write(f"logs of the stack: {self._config.dir / 'log'}\n")

    @cached_property
    def _reference(self) -> Reference:
        return Reference(self._config.job)

    def _scenario(self, name: str, stack: ChaosStack, on_progress: OnProgress) -> tuple[Row, list[str]]:
        trial = carry_out(name, stack, self._config.job, self._config.shape, on_progress)
        on_progress("answers are compared", self._config.requests)
        self._trials.append(trial)
        result = row(trial, self._reference)
        return result, failings(trial, result)

    def _hostile(self, name: str, stack: ChaosStack, on_progress: OnProgress) -> tuple[Row, list[str]]:
        config = self._config
        job = tiny_job(config.dir / "tiny", config.checkpoint_interval_ms)
        records = mixed_records(config.seed, config.hostile_records)
        with running_job(name, stack, job) as run:
            verdicts = under_hostile_input(run, records, config.patience_s, on_progress)
            result = hostile_row(run, verdicts, Reference(job), config.seed)
        return result, hostile_failings(verdicts, result)


def tiny_job(folder: Path, checkpoint_interval_ms: int) -> JobConfig:
    """A job with a very fast model, because most hostile input never reaches the model."""
    model = save_tiny(folder, Qwen2Config(**LAYERS_OF_TWO))
    return JobConfig(
        parallelism=2,
        checkpoint_interval_ms=checkpoint_interval_ms,
        engine=EngineConfig(model=str(model), max_model_len=256, threads=1),
        cache=CacheConfig(chunk_tokens=8),
    )


@contextmanager
def fresh_stack(folder: Path) -> Iterator[ChaosStack]:
    """Give a stack without data of earlier runs; stop and remove it at the end."""
    directory = folder / "stack"
    if (left := LocalStack.running_in(directory)) is not None:
        left.stop()
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with LocalStack(chaos_config(directory)) as local:
            yield ChaosStack(local)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    exit_on_user_error(main)

"""The command behind scripts/run_chaos.sh: harms the production job in many ways and counts what came of it."""

import datetime
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kafka.errors import KafkaError
from pydantic import Field, field_validator
from redis.exceptions import RedisError
from rich.progress import Progress

from core.config import CacheConfig, Config, EngineConfig, JobConfig, SizingConfig
from core.errors import UserError, exit_on_user_error
from core.model_path import with_model_found
from core.options import Parser, add_options, from_options
from experiments.config import ROOT, check_writable
from experiments.interrupts import EXIT_STATUS, Interrupted, interruptible
from experiments.report import Shown, show, write_csv
from local_stack import LocalStack
from tests.chaos.figure import draw
from tests.chaos.load import LoadShape, Reference
from tests.chaos.scenario import SCENARIOS, Scenario, Trial, carry_out
from tests.chaos.stack import ChaosStack, chaos_config
from tests.chaos.table import Row, failings, row, table
from workloads.progress import progress_bar

NAMES = tuple(scenario.name for scenario in SCENARIOS)
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
    """What is done, under which load, and where the results go."""

    scenarios: str = Field(default=",".join(NAMES), min_length=1, description="which, separated by commas")
    requests: int = Field(default=80, ge=8, le=100_000, description="requests of a scenario; every tenth is sent twice")
    rate: float = Field(default=3.0, gt=0, le=1000, description="requests a second")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="of the load")
    model: str = Field(default="default", min_length=1, description="path or name of a causal LM; default: built here")
    checkpoint_interval_ms: int = Field(default=2000, ge=100, description="of the job under chaos")
    patience_s: float = Field(default=90.0, gt=0, description="longest wait for the next answer")
    out: Path = Field(default=ROOT / "results" / "chaos", description="folder of the results")
    dir: Path = Field(
        default=ROOT / ".local" / "chaos", description="folder of the stack; its logs stay after a failure"
    )

    @field_validator("scenarios")
    @classmethod
    def _known(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",") if name.strip()]
        if unknown := set(names) - set(NAMES):
            raise ValueError(f"unknown scenario {', '.join(sorted(unknown))}; choose of {', '.join(NAMES)}")
        if len(set(names)) < len(names) or not names:
            raise ValueError("name each scenario once, and at least one")
        return ",".join(names)

    @property
    def chosen(self) -> list[Scenario]:
        known = {scenario.name: scenario for scenario in SCENARIOS}
        return [known[name] for name in self.scenarios.split(",")]

    @property
    def shape(self) -> LoadShape:
        return LoadShape(self.requests, self.rate, self.seed, self.patience_s)

    @property
    def job(self) -> JobConfig:
        # A small local tier, so that most of what is reused has to come from Redis.
        sizing = SizingConfig(capacity_chunks=8, min_capacity_chunks=8)
        return with_model_found(
            JobConfig(
                parallelism=2,
                checkpoint_interval_ms=self.checkpoint_interval_ms,
                engine=EngineConfig(model=self.model, max_model_len=512, threads=1),
                cache=CacheConfig(chunk_tokens=16, sizing=sizing),
            )
        )


def main() -> None:
    """Run what `sys.argv` states; exit status 1 where a promise was not kept."""
    parser = Parser(prog="scripts/run_chaos.sh", description=__doc__)
    add_options(parser, ChaosConfig)
    config = from_options(ChaosConfig, parser.parse_args())
    check_writable(config.out)
    try:
        with interruptible():
            failed = run(config)
    except Interrupted:
        sys.stderr.write("interrupted: the job is cancelled, the stack is stopped\n")
        sys.exit(EXIT_STATUS)
    sys.exit(1 if failed else 0)


def run(config: ChaosConfig) -> bool:
    """Carry out all scenarios, write and show what came of them; whether any has failed."""
    stem = f"chaos_{datetime.datetime.now():%Y%m%d_%H%M%S}"
    said: list[str] = []
    trials: list[Trial] = []
    rows: list[Row] = []
    reference = Reference(config.job)
    with fresh_stack(config.dir) as stack, progress_bar("{task.description:40}") as bar:
        for scenario in config.chosen:
            try:
                trial = carried_out(scenario, stack, config, bar)
            except (UserError, KafkaError, RedisError) as error:
                said.append(f"{scenario.name}: {' '.join(str(error).split())}")
                continue
            finally:
                stack.start_again()
            result = row(trial, reference)
            trials.append(trial)
            rows.append(result)
            said += [f"{scenario.name}: {line}" for line in failings(trial, result)]
            write_csv(table(rows), config.out / f"{stem}.csv")
            draw(trials, config.out / f"{stem}.png")
        if said:
            keep_logs(stack, config.dir / "log")
    show(table(rows), SHOWN, said or ["Every request was answered exactly once, and as the engine alone answers it."])
    if rows:
        sys.stdout.write(f"written to {config.out / stem}.csv and .png\n")
    if said:
        sys.stdout.write(f"logs of the stack: {config.dir / 'log'}\n")
    return bool(said)


def carried_out(scenario: Scenario, stack: ChaosStack, config: ChaosConfig, bar: Progress) -> Trial:
    """The scenario, with its progress shown."""
    task = bar.add_task(scenario.name, total=config.requests)

    def on_progress(what: str, count: int) -> None:
        bar.update(task, description=f"{scenario.name}: {what}", completed=count)

    trial = carry_out(scenario, stack, config.job, config.shape, on_progress)
    bar.update(task, description=f"{scenario.name}: done")
    return trial


@contextmanager
def fresh_stack(folder: Path) -> Iterator[ChaosStack]:
    """A stack without anything of an earlier run, stopped and removed in the end."""
    directory = folder / "stack"
    if (left := LocalStack.running_in(directory)) is not None:
        left.stop()
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with LocalStack(chaos_config(directory)) as local:
            yield ChaosStack(local)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def keep_logs(stack: ChaosStack, folder: Path) -> None:
    shutil.copytree(stack.logs, folder, dirs_exist_ok=True)


if __name__ == "__main__":
    exit_on_user_error(main)

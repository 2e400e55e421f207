"""Memory of the production job and of its services under a steady load for a long time: does anything grow?

    python -m benchmarks.soak --minutes 30 --out results/benchmarks/soak.json

Conversations begin and end all the time, with new ids, so no session grows for ever. Every few seconds the resident
memory of each slot, Python worker and TaskManager, of JobManager and Kafka is sampled, and the memory that Redis
reports as used. All samples are in a CSV beside the report, and in a figure.

The slope of a process is that of the least-squares line through its second half, when caches and heaps are full. Its
error is the standard error of the fit, which is too small if samples are correlated. The scatter is the deviation of
the samples from the line. A slope that stays the same in longer runs is a leak.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
from pydantic import Field
from rich.console import Console
from rich.table import Table

from benchmarks.command import carry_out, progress, stated
from benchmarks.conversations import SteadyConversations
from benchmarks.memory import MemorySampler, Sample
from benchmarks.on_flink import CpuSeconds, FlinkConfig, JobUnderTest, cluster, running
from benchmarks.report import Neighbours, Report, conditions_of
from benchmarks.soak_figure import Series, soak_figure
from benchmarks.trend import Trend
from cache.config import CacheConfig
from core.clock import SystemClock
from core.config import Config
from core.errors import UserError, exit_on_user_error
from experiments.collector import Collector, Ledger
from experiments.report import write_csv
from inference_service.config import EngineConfig
from local_stack import LocalStack
from operators.config import JobConfig
from operators.job_files import with_absolute_paths
from workloads.kafka_generator import KafkaLoadGenerator, offered


class SoakEngine(EngineConfig):
    """The model of the job."""

    threads: int = Field(default=1, ge=1, le=1024, description="CPU threads of a slot's engine")


class SoakConfig(Config):
    """Duration, load, and path of the results."""

    out: Path = Field(
        default=Path("results/benchmarks/soak.json"),
        description="path of the report; CSV and figure are written beside it",
    )
    minutes: float = Field(default=30.0, gt=0, le=10_000, description="duration of the load")
    rate: float = Field(default=2.0, gt=0, le=1000, description="requests per second")
    sessions: int = Field(default=8, ge=1, le=100_000, description="conversations at a time")
    turns: int = Field(default=5, ge=1, le=1000, description="requests of a conversation; then a new one replaces it")
    sample_every_s: float = Field(default=5.0, gt=0, description="time between two samples")
    parallelism: int = Field(default=2, ge=1, le=128, description="slots")
    seed: int = Field(default=0, ge=0, lt=1 << 32, description="random seed of the load")
    engine: SoakEngine = SoakEngine()
    cache: CacheConfig = CacheConfig()
    flink: FlinkConfig = FlinkConfig()

    @property
    def load(self) -> SteadyConversations:
        return SteadyConversations(
            requests=max(1, round(60 * self.minutes * self.rate)),
            rate_per_s=self.rate,
            seed=self.seed,
            sessions=self.sessions,
            turns=self.turns,
        )


def measure(config: SoakConfig, console: Console) -> Report:
    """Run the load. Raises `UserError` if the job ends or a prompt would not fit."""
    load = config.load
    if load.longest_prompt_tokens + load.max_new_tokens > config.engine.max_model_len:
        raise UserError(f"--turns: {config.turns} turns do not fit into --max-model-len; lower it or raise that")
    job = with_absolute_paths(JobConfig(parallelism=config.parallelism, engine=config.engine, cache=config.cache))
    ledger = Ledger()
    with ExitStack() as cleanup:
        found = cleanup.enter_context(cluster(config.flink, config.parallelism, remote=True))
        stack = LocalStack.running_in(config.flink.stack_dir)
        assert stack is not None
        under_test = cleanup.enter_context(running(config.flink, found, "soak", job))
        ready = under_test.slots[0]
        device = {"device": ready.device, "threads": ready.threads}
        where = conditions_of(device, {"name": ready.model, "dtype": ready.dtype}, found.redis_url)
        neighbours = Neighbours(ours_s=CpuSeconds(config.flink.stack_dir).total_s)
        sampler = cleanup.enter_context(MemorySampler(stack, config.sample_every_s))
        problems = under_load(config, under_test, load, ledger, console)
        busy_percent = neighbours.busy_percent()
    series, kinds = by_process(sampler.samples)
    trends = {name: trend for name, points in series.items() if (trend := Trend.of_second_half(*points)) is not None}
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(pd.DataFrame(sampler.samples), config.out.with_suffix(".csv"))
    said = (
        f"model {ready.model} | {config.rate:g} requests/s for {config.minutes:g} minutes, {config.parallelism} slots"
    )
    soak_figure(series, kinds, trends, said, config.out.with_suffix(".png"))
    return Report(
        benchmark="soak",
        **where,
        rounds=1,
        settings=config.model_dump(mode="json", exclude={"out", "flink"}) | {"problems": problems},
        figures={name: round(value, 4) for name, value in figures_of(ledger, trends, series).items()}
        | {"neighbours_busy_percent": round(busy_percent, 2)},
        samples={
            f"{name} {unit}": [round(value, 3) for value in values]
            for name, points in series.items()
            for unit, values in zip(("s", "MiB"), points, strict=True)
        },
    )


def under_load(
    config: SoakConfig, job: JobUnderTest, load: SteadyConversations, ledger: Ledger, console: Console
) -> list[str]:
    """Send the load until each request has an outcome; return one line per problem."""
    generator = KafkaLoadGenerator(job.producer, job.job.kafka.requests_topic, load, SystemClock())
    collector = Collector(job.reader, job.job.kafka, ledger)
    with progress(console) as bar, offered(generator, ledger.sent) as sending:
        task = bar.add_task("answered", total=load.requests)
        try:
            collector.until_settled(
                sending,
                config.flink.idle_timeout_s,
                watch=job.submitted.require_alive,
                on_progress=lambda count: bar.update(task, completed=count),
            )
        except UserError as error:
            return [str(error), *job.submitted.failures()]
    return job.submitted.failures()


def by_process(samples: Iterable[Sample]) -> tuple[Series, dict[str, str]]:
    """Return the samples of each process, and its kind."""
    series: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    kinds = {}
    for sample in samples:
        seconds, mib = series[sample.process]
        seconds.append(sample.at_s)
        mib.append(sample.mib)
        kinds[sample.process] = sample.kind
    return series, kinds


def figures_of(ledger: Ledger, trends: Mapping[str, Trend], series: Series) -> dict[str, float]:
    """Numbers of requests by outcome, and for each process its memory at the end and its growth."""
    figures = {
        "requests": float(len(ledger.all_sent)),
        "answered": float(len(ledger.responses)),
        "dead_lettered": float(len(ledger.dead_letters)),
        "lost": float(len(ledger.missing())),
        "duplicated": float(ledger.duplicates),
    }
    for name, (_, mib) in series.items():
        figures[f"{name} MiB at the end"] = mib[-1]
    for name, trend in trends.items():
        figures |= {
            f"{name} MiB/h": trend.slope_mib_per_h,
            f"{name} MiB/h error": trend.error_mib_per_h,
            f"{name} MiB scatter": trend.scatter_mib,
        }
    return figures


def show(report: Report, console: Console) -> None:
    """Print one row per process."""
    figures = report.figures
    table = Table("process", "MiB", "MiB/h", "error", "scatter MiB", box=None, pad_edge=False)
    for name in [name.removesuffix(" MiB") for name in report.samples if name.endswith(" MiB")]:
        shown = (f"{name} MiB at the end", f"{name} MiB/h", f"{name} MiB/h error", f"{name} MiB scatter")
        table.add_row(name, *(f"{figures[one]:.1f}" if one in figures else "-" for one in shown))
    console.print(table)
    counts = ("requests", "answered", "dead_lettered", "lost", "duplicated")
    console.print(", ".join(f"{figures[name]:.0f} {name.replace('_', ' ')}" for name in counts))
    for problem in report.settings["problems"]:
        console.print(problem, markup=False)


def main() -> None:
    config = stated(SoakConfig, "benchmarks.soak", "Memory under a steady load: does anything grow?")
    carry_out(config, measure, show)


if __name__ == "__main__":
    exit_on_user_error(main)

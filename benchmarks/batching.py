"""Continuous batching against micro-batches of 8: throughput under overload, latency at a rate both keep up with.

    python -m benchmarks.batching --trace AzureLLMInferenceTrace_conv.csv --out results/benchmarks/batching.json

Three jobs of one slot each are ready side by side: continuous batching with 32 rows, with 8 rows, and micro-batches of
8. One job at a time gets the load; the order alternates from round to round. All jobs get the same requests, with the
scaled lengths of an Azure trace (without `--trace`: lognormal lengths with its means). The requests come first as one
backlog, then paced at a share of the rate that the micro-batches reached. Prompts are scaled down more than answers: on
a CPU a prompt token costs about a twentieth of a decode step, on a GPU a hundredth or less. With equal scales the load
would be nearly all prefill. Latency is the time from a request's creation until its answer was read from Kafka.

Finally short requests come at even gaps, without and with one very long prompt among them. The p95 of the short
requests shows how much the long prompt delays them.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from rich.console import Console
from rich.table import Table

from benchmarks.command import carry_out, progress, stated
from benchmarks.on_flink import CpuSeconds, FlinkConfig, JobUnderTest, cluster, running
from benchmarks.report import Neighbours, Report, conditions_of, ratios, spread
from cache.config import CacheConfig
from core.config import Config
from core.errors import UserError, exit_on_user_error
from inference_service.config import EngineConfig
from operators.config import Batching, BatchingConfig, JobConfig
from operators.job_files import with_absolute_paths
from workloads.catalogue import make_workload
from workloads.config import Arrivals, IndependentConfig, TraceConfig, WorkloadConfig
from workloads.timed_request import TimedRequest, Workload
from workloads.token_ids import made_token_ids

CONTINUOUS, CONTINUOUS_8, MICRO = "continuous", "continuous_8_rows", "micro8"
VARIANTS = {
    CONTINUOUS: (32, BatchingConfig(batching=Batching.CONTINUOUS)),
    CONTINUOUS_8: (8, BatchingConfig(batching=Batching.CONTINUOUS)),
    MICRO: (8, BatchingConfig(batching=Batching.MICRO, batch_size=8)),
}
"""Rows of the engine and the way of batching, for each job."""
LONG_VARIANTS = (CONTINUOUS, MICRO)
AZURE_PROMPT_TOKENS, AZURE_ANSWER_TOKENS, AZURE_LENGTH_CV = 1155, 211, 0.86
"""Mean lengths of the conversation trace of 2023, and the approximate coefficient of variation of both."""
PACED_SEED, SHORT_SEED, WITH_LONG_SEED, WARM_SEED = 1 << 40, 1 << 41, 1 << 42, 1 << 43
"""Offsets of the seed, so that no two loads of a job share a request id."""

Samples = dict[str, list[float]]


class BatchingEngine(EngineConfig):
    """The model of all jobs. The benchmark sets their rows."""

    threads: int = Field(default=1, ge=1, le=1024, description="CPU threads of the engine")


class BatchingBenchmarkConfig(Config):
    """The loads, and how often they are measured."""

    out: Path = Field(default=Path("results/benchmarks/batching.json"), description="path of the report")
    trace: Path | None = Field(default=None, description="Azure trace, CSV; none: random lengths with the same means")
    rounds: int = Field(default=2, ge=1, description="measured rounds")
    requests: int = Field(default=48, ge=8, description="requests of the backlog, and as many of the paced load")
    prompt_scale: float = Field(default=1 / 16, gt=0, le=1, description="the trace's prompts are multiplied by this")
    answer_scale: float = Field(default=1 / 4, gt=0, le=1, description="the trace's answers are multiplied by this")
    paced_share: float = Field(default=0.6, gt=0, lt=1, description="paced rate over the rate micro-batches reach")
    short_requests: int = Field(default=30, ge=4, description="short requests around the long one")
    short_rate_per_s: float = Field(default=3.0, gt=0, description="rate of the short requests")
    long_prompt_tokens: int = Field(default=1900, ge=1, description="prompt of the long request")
    long_answer_tokens: int = Field(default=64, ge=1, description="answer of the long request")
    seed: int = Field(default=0, ge=0, lt=1 << 32, description="random seed of the requests")
    engine: BatchingEngine = BatchingEngine()
    flink: FlinkConfig = FlinkConfig()

    @property
    def longest(self) -> tuple[int, int]:
        """Maximum length of a load's prompts and answers; together they fill a row."""
        answer = self.engine.max_model_len // 16
        return self.engine.max_model_len - answer, answer


class WithLong:
    """A load with one long request inserted, which is due together with the request after it."""

    def __init__(self, short: Workload, long: TimedRequest) -> None:
        self._short = short
        self._long = long

    @property
    def requests(self) -> int:
        return self._short.requests + 1

    def adjustments(self) -> Mapping[str, int]:
        return self._short.adjustments()

    def __iter__(self) -> Iterator[TimedRequest]:
        pending: TimedRequest | None = self._long
        for timed in self._short:
            if pending is not None and timed.at_ms >= pending.at_ms:
                yield pending
                pending = None
            yield timed
        if pending is not None:
            yield pending


def job_of(variant: str, engine: EngineConfig) -> JobConfig:
    rows, batching = VARIANTS[variant]
    engine = engine.model_copy(update={"max_running": rows})
    return JobConfig(parallelism=1, engine=engine, batching=batching, cache=CacheConfig(cache=False))


def load(config: BatchingBenchmarkConfig, seed: int, rate_per_s: float | None = None) -> Workload:
    """Return the trace's requests, or generated ones, at this mean rate, with the trace's gaps, or random ones."""
    prompt, answer = config.longest
    common: dict[str, Any] = {
        "requests": config.requests,
        "seed": config.seed + seed,
        "max_prompt_tokens": prompt,
        "max_new_tokens": answer,
    }
    if config.trace is None:
        made = IndependentConfig(
            rate_per_s=rate_per_s or 1.0,
            arrivals=Arrivals.POISSON,
            prompt_tokens=max(1, round(AZURE_PROMPT_TOKENS * config.prompt_scale)),
            answer_tokens=max(1, round(AZURE_ANSWER_TOKENS * config.answer_scale)),
            length_cv=AZURE_LENGTH_CV,
        )
        return make_workload(WorkloadConfig(workload="independent", independent=made, **common))
    replay = TraceConfig(trace=config.trace, prompt_scale=config.prompt_scale, output_scale=config.answer_scale)
    azure = WorkloadConfig(workload="azure", replay=replay, **common)
    if rate_per_s is not None:
        paced = replay.model_copy(update={"time_scale": rate_per_s / _rate_of(make_workload(azure))})
        azure = azure.model_copy(update={"replay": paced})
    return make_workload(azure)


def short_load(config: BatchingBenchmarkConfig, seed: int) -> Workload:
    short = IndependentConfig(
        rate_per_s=config.short_rate_per_s, arrivals=Arrivals.EVEN, prompt_tokens=32, answer_tokens=8
    )
    return make_workload(
        WorkloadConfig(
            workload="independent",
            requests=config.short_requests,
            seed=config.seed + seed,
            independent=short,
        )
    )


def with_long(config: BatchingBenchmarkConfig, short: Workload, seed: int) -> WithLong:
    """Insert the long request after a third of `short`, so that the requests it delays are still part of the load."""
    long = TimedRequest(
        at_ms=1000 * (config.short_requests // 3) / config.short_rate_per_s,
        request_id=f"long-{config.seed + seed}",
        session_id="long/s1",
        user_id="long",
        max_new_tokens=config.long_answer_tokens,
        prompt_token_ids=made_token_ids(config.seed + seed, "long", config.long_prompt_tokens, vocab_size=256),
    )
    return WithLong(short, long)


def figures_of(samples: Mapping[str, Sequence[float]], rounds: int) -> dict[str, float]:
    """Figures of the report: medians over the rounds of each round's ratios, with quartiles."""
    figures: dict[str, float] = {}
    micro_p95 = by_round(samples[f"{MICRO}_paced_ms"], rounds, 95)
    for variant, suffix in ((CONTINUOUS, ""), (CONTINUOUS_8, "_8_rows")):
        rates = ratios(samples[f"{variant}_tokens_per_s"], samples[f"{MICRO}_tokens_per_s"])
        figures |= spread(f"continuous_over_micro8_throughput{suffix}", rates)
        p95 = by_round(samples[f"{variant}_paced_ms"], rounds, 95)
        figures |= spread(f"continuous_over_micro8_p95{suffix}", ratios(p95, micro_p95))
    for variant in LONG_VARIANTS:
        prefix = "" if variant == CONTINUOUS else f"{variant}_"
        without, beside = (
            by_round(samples[f"{variant}_short_ms_{name}"], rounds, 95) for name in ("without_long", "with_long")
        )
        figures |= spread(f"{prefix}short_p95_with_long_over_without", ratios(beside, without))
        figures |= spread(f"{variant}_short_p95_without_long_ms", without)
        figures |= spread(f"{variant}_short_p95_with_long_ms", beside)
    for variant in VARIANTS:
        figures |= spread(f"{variant}_tokens_per_s", samples[f"{variant}_tokens_per_s"])
        figures |= spread(f"{variant}_requests_per_s", samples[f"{variant}_requests_per_s"])
        for percent in (50, 95):
            figures |= spread(
                f"{variant}_paced_p{percent}_ms", by_round(samples[f"{variant}_paced_ms"], rounds, percent)
            )
    figures |= spread("paced_requests_per_s", samples["paced_requests_per_s"])
    return {name: round(value, 4) for name, value in figures.items()}


def by_round(values: Sequence[float], rounds: int, percent: float) -> list[float]:
    """Return the percentile of each round (linear between ranks, R type 7). All rounds have equally many values."""
    return [float(value) for value in np.percentile(np.reshape(values, (rounds, -1)), percent, axis=1)]


def measure(config: BatchingBenchmarkConfig, console: Console) -> Report:
    """Run everything. Raises `UserError`."""
    check(config)
    engine = with_absolute_paths(job_of(CONTINUOUS, config.engine)).engine
    samples: Samples = defaultdict(list)
    cpu = CpuSeconds(config.flink.stack_dir)
    with ExitStack() as cleanup:
        found = cleanup.enter_context(cluster(config.flink, slots=len(VARIANTS)))
        neighbours = Neighbours(ours_s=cpu.total_s)
        bar = cleanup.enter_context(progress(console))
        jobs = {}
        for variant in bar.track(VARIANTS, description="starting jobs"):
            jobs[variant] = cleanup.enter_context(running(config.flink, found, variant, job_of(variant, engine)))
        ready = jobs[CONTINUOUS].slots[0]
        device = {"threads": config.engine.threads, "device": ready.device}
        where = conditions_of(device, {"name": ready.model, "dtype": ready.dtype}, redis_url=None)
        for job in bar.track(jobs.values(), description="warming up"):
            job.offer(load(config.model_copy(update={"requests": 8}), WARM_SEED), backlog=True)
        for round_ in bar.track(range(config.rounds), description="rounds"):
            order = list(jobs) if round_ % 2 == 0 else list(reversed(jobs))
            overload(config, round_, [jobs[name] for name in order], samples)
            paced(config, round_, [jobs[name] for name in order], samples)
            beside_long(config, round_, [jobs[name] for name in order if name in LONG_VARIANTS], samples)
        busy_percent = neighbours.busy_percent()
    return Report(
        benchmark="batching",
        **where,
        rounds=config.rounds,
        settings=config.model_dump(
            mode="json", exclude={"out": True, "flink": True, "trace": True, "engine": {"max_running"}}
        )
        | {
            "lengths": "generated: lognormal, with the trace's means" if config.trace is None else config.trace.name,
            "variants": {
                name: {"rows": rows} | batching.model_dump(mode="json") for name, (rows, batching) in VARIANTS.items()
            },
        },
        figures=figures_of(samples, config.rounds) | {"neighbours_busy_percent": round(busy_percent, 2)},
        samples={name: [round(value, 4) for value in values] for name, values in samples.items()},
    )


def check(config: BatchingBenchmarkConfig) -> None:
    """Raises `UserError` for options that would fail or mislead after everything has started."""
    if config.engine.is_simulated:
        raise UserError("--engine: batching is compared on a real engine; leave it out")
    if config.long_prompt_tokens + config.long_answer_tokens > config.engine.max_model_len:
        raise UserError(
            f"--long-prompt-tokens: {config.long_prompt_tokens} and the answer's {config.long_answer_tokens} are more "
            f"than --max-model-len, {config.engine.max_model_len}; give fewer"
        )
    held = sum(1 for _ in load(config, 0))
    if held < config.requests:
        raise UserError(f"--requests: the trace has {held} that fit with these options; give at most that many")


def overload(config: BatchingBenchmarkConfig, round_: int, jobs: Sequence[JobUnderTest], samples: Samples) -> None:
    """Offer all requests at once."""
    for job in jobs:
        outcome = job.offer(load(config, round_), backlog=True)
        samples[f"{job.name}_tokens_per_s"].append(outcome.tokens_per_s)
        samples[f"{job.name}_requests_per_s"].append(outcome.requests_per_s)


def paced(config: BatchingBenchmarkConfig, round_: int, jobs: Sequence[JobUnderTest], samples: Samples) -> None:
    """Offer the same load to all, at a rate that micro-batches keep up with."""
    rate_per_s = config.paced_share * samples[f"{MICRO}_requests_per_s"][-1]
    samples["paced_requests_per_s"].append(rate_per_s)
    for job in jobs:
        outcome = job.offer(load(config, PACED_SEED + round_, rate_per_s), backlog=False)
        samples[f"{job.name}_paced_ms"] += [answer.e2e_ms for answer in outcome.answers]


def beside_long(config: BatchingBenchmarkConfig, round_: int, jobs: Sequence[JobUnderTest], samples: Samples) -> None:
    """Offer short requests, without and with the long one."""
    loads: list[tuple[str, Workload]] = [
        ("without_long", short_load(config, SHORT_SEED + round_)),
        ("with_long", with_long(config, short_load(config, WITH_LONG_SEED + round_), round_)),
    ]
    for job in jobs:
        for name, work in loads if round_ % 2 == 0 else reversed(loads):
            outcome = job.offer(work, backlog=False)
            samples[f"{job.name}_short_ms_{name}"] += [
                answer.e2e_ms for answer in outcome.answers if answer.response.user_id != "long"
            ]


def show(report: Report, console: Console) -> None:
    """Print the main figures."""
    figures = report.figures
    table = Table("", "tokens/s", "paced p50\nms", "paced p95\nms", "throughput\n/ micro8", "p95\n/ micro8")
    for variant in VARIANTS:
        own = [f"{figures[f'{variant}_{name}']:.0f}" for name in ("tokens_per_s", "paced_p50_ms", "paced_p95_ms")]
        suffix = {CONTINUOUS: "", CONTINUOUS_8: "_8_rows"}.get(variant)
        compared = ["", ""]
        if suffix is not None:
            compared = [f"{figures[f'continuous_over_micro8_{name}{suffix}']:.2f}" for name in ("throughput", "p95")]
        table.add_row(variant, *own, *compared)
    console.print(table)
    for variant, prefix in zip(LONG_VARIANTS, ("", f"{MICRO}_"), strict=True):
        console.print(
            f"{variant}: short p95 {figures[f'{variant}_short_p95_without_long_ms']:.0f} ms, beside a long prompt "
            f"{figures[f'{variant}_short_p95_with_long_ms']:.0f} ms: ratio "
            f"{figures[f'{prefix}short_p95_with_long_over_without']:.2f}"
        )
    console.print(
        f"lengths: {report.settings['lengths']}; others kept {figures['neighbours_busy_percent']:.0f} % of the cores "
        "busy"
    )


def _rate_of(workload: Workload) -> float:
    """Mean rate of its arrivals, in requests per second."""
    times = [timed.at_ms for timed in workload]
    if len(times) < 2 or times[-1] <= times[0]:
        raise UserError("--trace: its requests all arrive at once and have no rate; give another trace")
    return 1000 * (len(times) - 1) / (times[-1] - times[0])


def main() -> None:
    carry_out(
        stated(BatchingBenchmarkConfig, "benchmarks.batching", "Continuous batching against micro-batches of 8."),
        measure,
        show,
    )


if __name__ == "__main__":
    exit_on_user_error(main)

"""What Kafka and Flink around the engine cost: ratio of throughput, added latency, and maximum rate of records.

    python -m benchmarks.pipeline --out results/benchmarks/pipeline.json

Saturation: the same requests as one backlog run in turns through Kafka -> Flink -> Kafka in one slot, and on the bare
engine in its own process. Model, rows, threads and admission are the same, and neither has a cache. The time counts
from sending the first request to the last answer; for the pipeline, to its arrival at a reader of the responses topic.
One side is idle while the other is measured.

Added latency: requests come at even gaps that keep the engine busy for a tenth of the time, so none waits for another.
The bare engine answers each request twice, before and after the pipeline does. The added latency of a request is its
time in the pipeline, up to the answer's arrival at a reader, less the mean of the two. Computing times vary by some
percent, which is part of the difference. So the requests are short, and the difference of the two bare runs is
reported.

Zero-time engine: the simulated engine on a device that takes no time. Only the pipeline is left. Reported are its rate
with one slot and two, the CPU time of each part, and the load of Flink's threads; the same for the job's graph with
functions that only pass records on, for a consumer loop and for Beam RunInference (`benchmarks/zero_engine.py`).
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from pydantic import Field
from rich.console import Console
from rich.table import Table

from benchmarks import zero_engine
from benchmarks.bare_engine import BareEngine, bare_engine
from benchmarks.command import carry_out, progress, stated
from benchmarks.on_flink import PARTS, STATES, CpuSeconds, FlinkConfig, JobUnderTest, cluster, running
from benchmarks.report import Neighbours, Report, conditions_of, ratios, spread
from benchmarks.zero_engine import JOBS, OURS, SLOTS, ZeroEngine, ZeroLoads
from cache.config import CacheConfig
from core.clock import SystemClock
from core.config import Config
from core.errors import UserError, exit_on_user_error
from core.records import Request
from inference_service.config import EngineConfig
from operators.config import JobConfig
from operators.job_files import with_absolute_paths
from workloads.config import Arrivals, IndependentConfig, WorkloadConfig
from workloads.independent import IndependentWorkload
from workloads.timed_request import Workload

Samples = dict[str, list[float]]

LIGHT_LOAD = 0.1
"""Share of the time during which the engine is busy when added latency is measured."""
LATENCY_SEED, ZERO_SEED, WARM_SEED = 1 << 40, 1 << 41, 1 << 42
"""Offsets of the seed, so that no two loads of a job share a request id."""


class PipelineEngine(EngineConfig):
    """The model of the pipeline and of the bare engine."""

    threads: int = Field(default=1, ge=1, le=1024, description="CPU threads of the engine, in Flink and bare")


class PipelineConfig(Config):
    """The loads, and how often they are measured."""

    out: Path = Field(default=Path("results/benchmarks/pipeline.json"), description="path of the report")
    rounds: int = Field(default=3, ge=1, description="measured rounds of saturation")
    requests: int = Field(default=64, ge=2, description="requests of one saturating backlog")
    latency_requests: int = Field(default=60, ge=2, description="requests of the paced load at 10 %")
    latency_prompt_tokens: int = Field(default=32, ge=1, description="mean length of their prompts")
    latency_answer_tokens: int = Field(default=4, ge=1, description="mean length of their answers")
    prompt_tokens: int = Field(default=128, ge=1, description="mean length of a prompt")
    answer_tokens: int = Field(default=32, ge=1, description="mean length of an answer")
    length_cv: float = Field(default=0.5, ge=0, le=10, description="deviation of both lengths over their mean")
    records: int = Field(default=5000, ge=100, description="records of a backlog for the zero-time engine")
    zero_rounds: int = Field(default=5, ge=1, description="measured rounds of the zero-time engine")
    seed: int = Field(default=0, ge=0, lt=1 << 32, description="random seed of the requests")
    engine: PipelineEngine = PipelineEngine()
    flink: FlinkConfig = FlinkConfig()


def load(config: PipelineConfig, requests: int, seed: int, rate_per_s: float = 1.0) -> IndependentWorkload:
    """Return requests with lognormal lengths at even gaps."""
    return IndependentWorkload(
        WorkloadConfig(
            workload="independent",
            requests=requests,
            seed=config.seed + seed,
            max_new_tokens=8 * config.answer_tokens,
            max_prompt_tokens=max(config.prompt_tokens, config.engine.max_model_len - 8 * config.answer_tokens),
            independent=IndependentConfig(
                rate_per_s=rate_per_s,
                arrivals=Arrivals.EVEN,
                prompt_tokens=config.prompt_tokens,
                answer_tokens=config.answer_tokens,
                length_cv=config.length_cv,
            ),
        )
    )


def figures_of(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Figures of the report: medians over rounds with quartiles, and percentiles over the paired requests."""
    figures: dict[str, float] = {}
    pipeline, bare = samples["pipeline_tokens_per_s"], samples["bare_tokens_per_s"]
    figures |= spread("saturation_ratio", ratios(pipeline, bare))
    figures |= spread("pipeline_tokens_per_s", pipeline)
    figures |= spread("bare_tokens_per_s", bare)
    figures |= spread("pipeline_requests_per_s", samples["pipeline_requests_per_s"])
    alone = [(one + two) / 2 for one, two in zip(samples["alone_ms"], samples["alone_again_ms"], strict=True)]
    added = [e2e - own for e2e, own in zip(samples["e2e_ms"], alone, strict=True)]
    outside = [e2e - inference for e2e, inference in zip(samples["e2e_ms"], samples["inference_ms"], strict=True)]
    noise = [abs(one - two) for one, two in zip(samples["alone_ms"], samples["alone_again_ms"], strict=True)]
    for name, values in (
        ("added_latency", added),
        ("outside_engine", outside),
        ("e2e_at_10_percent", samples["e2e_ms"]),
        ("alone", alone),
        ("alone_difference", noise),
    ):
        figures |= {f"{name}_p50_ms": percentile(values, 50), f"{name}_p95_ms": percentile(values, 95)}
    figures |= zero_engine.figures_of({name: values for name, values in samples.items() if zero_engine.is_one(name)})
    return {name: round(value, 4) for name, value in figures.items()}


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the percentile, linear between the two nearest ranks (R type 7)."""
    return float(np.percentile(list(values), percent))


def measure(config: PipelineConfig, console: Console) -> Report:
    """Run everything. Raises `UserError`."""
    if config.engine.is_simulated:
        raise UserError("--engine: this benchmark sets the engines itself; leave it out")
    job = with_absolute_paths(JobConfig(parallelism=1, engine=config.engine, cache=CacheConfig(cache=False)))
    samples: Samples = defaultdict(list)
    cpu = CpuSeconds(config.flink.stack_dir)
    with ExitStack() as cleanup:
        bare = cleanup.enter_context(bare_engine(job))
        device, model = bare.facts()
        where = conditions_of(device, model, redis_url=None)
        found = cleanup.enter_context(cluster(config.flink, slots=len(JOBS) * max(SLOTS)))
        neighbours = Neighbours(ours_s=cpu.total_s)
        bar = cleanup.enter_context(progress(console))
        with running(config.flink, found, "saturation", job) as pipeline:
            for round_ in bar.track(range(config.rounds), description="saturation"):
                if round_ == 0:
                    warm_up(config, pipeline, bare)
                saturate(config, round_, pipeline, bare, samples)
            loads = light_loads(config)
            latency = added_latency(loads, pipeline, bare, samples)
            for _ in bar.track(latency, total=len(loads), description="added latency"):
                pass
        zero = ZeroEngine(config.flink, found, ZeroLoads(config.records, config.seed + ZERO_SEED), samples, bar)
        operators = {f"p{slots}": zero.jobs(slots, config.zero_rounds, cpu) for slots in SLOTS}
        zero.loop(config.zero_rounds)
        zero.run_inference(config.zero_rounds)
        busy_percent = neighbours.busy_percent()
    return Report(
        benchmark="pipeline",
        **where,
        rounds=config.rounds,
        settings=config.model_dump(mode="json", exclude={"out", "flink"})
        | {"batching": job.batching.model_dump(mode="json"), "operators": operators},
        figures=figures_of(samples) | {"neighbours_busy_percent": round(busy_percent, 2)},
        samples={name: [round(value, 4) for value in values] for name, values in samples.items()},
    )


def warm_up(config: PipelineConfig, pipeline: JobUnderTest, bare: BareEngine) -> None:
    few = load(config, max(2, config.requests // 4), WARM_SEED)
    pipeline.offer(few, backlog=True)
    bare.together(requests_of(few))


def saturate(config: PipelineConfig, round_: int, pipeline: JobUnderTest, bare: BareEngine, samples: Samples) -> None:
    """Measure one round: the same backlog through both, in an order that alternates."""
    work = load(config, config.requests, round_)

    def through_pipeline() -> None:
        outcome = pipeline.offer(work, backlog=True)
        samples["pipeline_tokens_per_s"].append(outcome.tokens_per_s)
        samples["pipeline_requests_per_s"].append(outcome.requests_per_s)
        samples["pipeline_tokens"].append(outcome.output_tokens)

    def through_bare() -> None:
        tokens, took_s = bare.together(requests_of(work))
        samples["bare_tokens_per_s"].append(tokens / took_s)
        samples["bare_tokens"].append(tokens)

    turns = [through_pipeline, through_bare]
    for turn in turns if round_ % 2 == 0 else reversed(turns):
        turn()


def light_loads(config: PipelineConfig) -> list[IndependentWorkload]:
    """Return loads of one short request each."""
    short = config.model_copy(
        update={"prompt_tokens": config.latency_prompt_tokens, "answer_tokens": config.latency_answer_tokens}
    )
    return [load(short, 1, LATENCY_SEED + number) for number in range(config.latency_requests)]


def added_latency(
    loads: Sequence[Workload], pipeline: JobUnderTest, bare: BareEngine, samples: Samples
) -> Iterator[None]:
    """Run each request on the bare engine, through the pipeline, and on the bare engine again, to cancel out drift."""
    alone_ms = statistics.mean(time_ms for one in loads for time_ms in bare.alone_ms(requests_of(one)))
    gap_s = alone_ms / LIGHT_LOAD / 3 / 1000
    due_s = time.monotonic()
    for one in loads:
        for turn in ("alone_ms", "pipeline", "alone_again_ms"):
            time.sleep(max(0.0, due_s - time.monotonic()))  # the load's own pace
            due_s += gap_s
            if turn != "pipeline":
                samples[turn] += bare.alone_ms(requests_of(one))
                continue
            (answer,) = pipeline.offer(one, backlog=False).answers
            samples["e2e_ms"].append(answer.e2e_ms)
            samples["inference_ms"].append(answer.response.inference_ms)
            samples["arrival_to_prefill_ms"].append(answer.response.wait_ms)
            samples["answer_to_reader_ms"].append(answer.received_ms - answer.response.completed_at_ms)
        yield


def requests_of(workload: Workload) -> list[Request]:
    """Return the workload's requests, all created now, for an engine without a schedule."""
    now_ms = SystemClock().wall_ms()
    return [timed.created(now_ms) for timed in workload]


def show(report: Report, console: Console) -> None:
    """Print the main figures."""
    figures = report.figures
    console.print(
        f"saturation: {figures['pipeline_tokens_per_s']:.0f} tokens/s through the pipeline, "
        f"{figures['bare_tokens_per_s']:.0f} bare: ratio {figures['saturation_ratio']:.3f} (quartiles "
        f"{figures['saturation_ratio_p25']:.3f} and {figures['saturation_ratio_p75']:.3f})"
    )
    console.print(
        f"added latency at {LIGHT_LOAD:.0%} load: p50 {figures['added_latency_p50_ms']:.1f} ms, "
        f"p95 {figures['added_latency_p95_ms']:.1f} ms; outside of the engine p50 "
        f"{figures['outside_engine_p50_ms']:.1f} ms, p95 {figures['outside_engine_p95_ms']:.1f} ms; two bare runs "
        f"differ by p50 {figures['alone_difference_p50_ms']:.1f} ms, p95 {figures['alone_difference_p95_ms']:.1f} ms"
    )
    show_zero_engine(figures, report.settings["operators"], console)
    console.print(f"others kept {figures['neighbours_busy_percent']:.0f} % of the cores busy")


def show_zero_engine(
    figures: Mapping[str, float], operators: Mapping[str, Mapping[str, Sequence[str]]], console: Console
) -> None:
    """Print one column per job and number of slots, and one line per alternative."""
    runs = [(name, f"p{slots}") for slots in SLOTS for name in JOBS]
    table = Table("zero-time engine", *(f"{name.replace('_', ' ')}, {slots[1:]} slots" for name, slots in runs))
    table.add_row("records/s", *(f"{figures[f'records_per_s_{name}_{slots}']:.0f}" for name, slots in runs))
    for part in PARTS:
        cells = (figures.get(f"cpu_s_per_1000_{part}_{name}_{slots}", 0.0) for name, slots in runs)
        table.add_row(f"CPU s / 1000: {part}", *(f"{cell:.3g}" for cell in cells))
    names = operators[runs[0][1]][OURS]
    for index, operator in enumerate(names):
        shares = (
            [f"{figures[f'operator_{index}_{state}_percent_{name}_{slots}']:.0f}" for state in STATES]
            for name, slots in runs
        )
        table.add_row(f"{operator[:40]}: {' / '.join(STATES)} %", *map(" / ".join, shares))
    console.print(table)
    for slots in (f"p{slots}" for slots in SLOTS):
        console.print(f"{slots}: {figures[f'{OURS}_over_pass_through_{slots}']:.2f} of the pass-through job")
    console.print(
        f"a consumer loop: {figures['records_per_s_loop']:.0f} records/s; RunInference, without Kafka: "
        f"{figures['records_per_s_run_inference']:.0f}"
    )


def main() -> None:
    config = stated(PipelineConfig, "benchmarks.pipeline", "What Kafka and Flink around the engine cost.")
    carry_out(config, measure, show)


if __name__ == "__main__":
    exit_on_user_error(main)

"""Our pipeline against common alternatives on the same requests, model and cores, side by side in one run.

    python -m benchmarks.alternatives --out results/benchmarks/alternatives.json

Each round offers the same new requests to all as one backlog; the order alternates from round to round. Ours is a job
on the local stack. The alternatives are a loop around `generate` on the same broker, and two without Kafka: the
continuous batching of `transformers`, and RunInference of Apache Beam. All are loaded and warm before the first request
is sent. With Kafka, a load ends when a reader of the answers has the last one; without, when the last answer is made.
Each alternative is first tried in several layouts of processes and threads, and measured in its fastest.

There are two loads: requests that share nothing, and conversations of several turns with one system prompt, which let
our cache reuse chunks. All answers are greedy and compared with ours. They are equal in float32. In bfloat16 and
float16 an answer may depend on the batch, so more of them can differ.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from rich.console import Console
from rich.table import Table

from benchmarks.baselines.contenders import Contender, InProcess, OnKafka, OurJob, Taken
from benchmarks.baselines.group import Worker, WorkerGroup
from benchmarks.baselines.worker import Answers
from benchmarks.command import carry_out, progress
from benchmarks.on_flink import CpuSeconds, FlinkConfig, cluster, running
from benchmarks.report import Neighbours, Report, conditions_of, ratios, spread
from benchmarks.reuse_probe import WrongMeasurementError
from core.config import Config
from core.errors import UserError, exit_on_user_error
from core.machine import usable_cores
from experiments.config import Command
from inference_service.config import SamplingDefaults
from operators.config import JobConfig
from operators.job_files import with_absolute_paths
from workloads.catalogue import make_workload
from workloads.config import (
    IndependentConfig,
    LongPrompts,
    PhasesConfig,
    TraceConfig,
    WorkloadConfig,
)
from workloads.timed_request import Workload

OURS = "ours"
NO_REUSE, MULTI_TURN = "no_reuse", "multi_turn"
LOADS: Mapping[str, tuple[str, ...]] = {
    NO_REUSE: ("consumer_loop", "transformers_continuous", "run_inference"),
    MULTI_TURN: ("consumer_loop",),
}
"""Alternatives for each load, by the module of their process."""
IN_BOTH = "consumer_loop"
"""The alternative that is measured on both loads."""
PACKAGES = ("apache-beam", "kafka-python")


@dataclass(frozen=True)
class Layout:
    """Processes and threads of an alternative."""

    processes: int
    threads: int
    """CPU threads of each process."""

    def __str__(self) -> str:
        return f"{self.processes}x{self.threads}"


def _layouts(text: object) -> object:
    if not isinstance(text, str):
        return text
    found = []
    for word in text.split(","):
        processes, _, threads = word.strip().partition("x")
        if not (processes.isdecimal() and threads.isdecimal() and 1 <= int(processes) <= 64 and int(threads) >= 1):
            raise ValueError(f"{word.strip()!r} is not PROCESSESxTHREADS; give layouts such as 1x2,2x1")
        found.append(Layout(int(processes), int(threads)))
    return tuple(found)


def _of_the_cores() -> tuple[Layout, ...]:
    """Return three layouts: one process with all cores, one process per core, and one process with one core."""
    cores = usable_cores()
    return tuple(dict.fromkeys((Layout(1, cores), Layout(cores, 1), Layout(1, 1))))


class AlternativesConfig(Config):
    """The loads, and how often they are measured."""

    out: Path = Field(default=Path("results/benchmarks/alternatives.json"), description="path of the report")
    rounds: int = Field(default=3, ge=1, description="measured rounds of each load")
    requests: int = Field(default=48, ge=1, description="requests of a round that share nothing")
    trace: Path | None = Field(
        default=None, description="CSV of an Azure trace, whose lengths are scaled; none: lognormal, with its means"
    )
    prompt_scale: float = Field(default=1 / 16, gt=0, le=1, description="the trace's prompts are multiplied by this")
    answer_scale: float = Field(default=1 / 4, gt=0, le=1, description="the trace's answers are multiplied by this")
    prompt_tokens: int = Field(default=72, ge=1, description="without a trace: mean length of a prompt")
    answer_tokens: int = Field(default=53, ge=1, description="without a trace: mean length of an answer")
    length_cv: float = Field(default=0.9, ge=0, le=10, description="without a trace: deviation over mean of both")
    max_answer_tokens: int = Field(default=192, ge=1, description="maximum length of an answer")
    turns: int = Field(default=64, ge=1, description="requests of a round of conversations")
    turn_tokens: int = Field(default=64, ge=2, description="conversations: mean length of a user's turn")
    reply_tokens: int = Field(default=16, ge=1, description="conversations: length of an answer")
    system_prompt_tokens: int = Field(default=512, ge=0, description="conversations: length of the system prompt")
    max_prompt_tokens: int = Field(default=1024, ge=1, description="longest prompt of both loads")
    batch: int = Field(default=8, ge=1, le=1024, description="maximum batch of an alternative, in requests")
    layouts: Annotated[tuple[Layout, ...], BeforeValidator(_layouts)] = Field(
        default=_of_the_cores(),
        min_length=1,
        description="PROCESSESxTHREADS in which alternatives are tried, as 1x2,2x1",
    )
    trial_requests: int = Field(default=16, ge=1, description="requests of each trial")
    most_mismatched: float = Field(
        default=0.05, ge=0, le=1, description="share of an alternative's answers that may differ from ours by rounding"
    )
    seed: int = Field(default=0, ge=0, lt=1 << 32, description="random seed of the requests")
    flink: FlinkConfig = FlinkConfig()
    job: JobConfig = JobConfig()


COMMAND = Command(
    config=AlternativesConfig,
    prog="python -m benchmarks.alternatives",
    description="Our pipeline against common alternatives on the same requests, model and cores.",
    # The local tier holds all conversations of a round: 256 MiB per slot with the default model.
    own_defaults={"capacity_chunks": 1024},
    decided={
        "engine": "a real engine is compared; leave it out",
        "profile": "a real engine is compared; leave it out",
        "brokers": "all run on the local stack; leave it out",
        "redis_url": "a second tier gains nothing on one machine; leave it out",
        "ship_connector": "all run on the local stack; leave it out",
    },
)


def load_of(config: AlternativesConfig, load: str, requests: int, seed: int) -> Workload:
    """Return the load; the same values give the same requests. Raises `UserError`."""
    if load == MULTI_TURN:
        return make_workload(
            WorkloadConfig(
                workload="phases",
                requests=requests,
                seed=seed,
                max_new_tokens=config.reply_tokens,
                max_prompt_tokens=config.max_prompt_tokens,
                phases=PhasesConfig(system_prompt_tokens=config.system_prompt_tokens, turn_tokens=config.turn_tokens),
            )
        )
    return make_workload(
        WorkloadConfig(
            workload="independent" if config.trace is None else "azure",
            requests=requests,
            seed=seed,
            max_new_tokens=config.max_answer_tokens,
            max_prompt_tokens=config.max_prompt_tokens,
            replay=TraceConfig(
                trace=config.trace,
                prompt_scale=config.prompt_scale,
                output_scale=config.answer_scale,
                long_prompts=LongPrompts.CUT,
            ),
            independent=IndependentConfig(
                prompt_tokens=config.prompt_tokens, answer_tokens=config.answer_tokens, length_cv=config.length_cv
            ),
        )
    )


def check(config: AlternativesConfig) -> None:
    """Check options that depend on each other, before anything is started. Raises `UserError`."""
    engine = config.job.engine
    if engine.device not in ("auto", "cpu"):
        raise UserError(f"--device: this compares on the cores of a CPU, not on {engine.device}; leave it out")
    longest = config.max_prompt_tokens + max(config.max_answer_tokens, config.reply_tokens)
    if longest > engine.max_model_len:
        raise UserError(
            f"--max-prompt-tokens: such a prompt and the longest answer have {longest} tokens, but the engine holds "
            f"{engine.max_model_len}; lower it or raise --max-model-len"
        )
    for load in LOADS:
        next(iter(load_of(config, load, 1, config.seed)))


def fastest(tried: Mapping[Layout, float]) -> Layout:
    """Return the layout with the highest rate; `tried` has the tokens/s of each."""
    return max(tried, key=lambda layout: tried[layout])


def mismatched(name: str, answers: Answers, ours: Answers) -> int:
    """Return the number of answers that differ from ours.

    Raises `WrongMeasurementError` if the two did not answer the same requests.
    """
    if answers.keys() != ours.keys():
        raise WrongMeasurementError(f"{name} answered {len(answers)} requests and ours {len(ours)}, not the same ones")
    return sum(answers[request_id] != ours[request_id] for request_id in ours)


def figures_of(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Our rate over that of each alternative, round by round, on the same requests; above 1 ours is faster."""
    figures: dict[str, float] = {}
    for load, alternatives in LOADS.items():
        for name in alternatives:
            suffix = f"_{load}" if name == IN_BOTH else ""
            figures |= spread(f"over_{name}{suffix}", ratios(samples[f"{load}_{name}_s"], samples[f"{load}_{OURS}_s"]))
            figures[f"mismatched_answers_{name}{suffix}"] = sum(samples[f"{load}_{name}_mismatched"])
            figures[f"answers_{name}{suffix}"] = sum(samples[f"{load}_{name}_answers"])
        for name in (OURS, *alternatives):
            figures |= spread(f"{load}_{name}_tokens_per_s", samples[f"{load}_{name}_tokens_per_s"])
            figures |= spread(f"{load}_{name}_requests_per_s", samples[f"{load}_{name}_requests_per_s"])
    return {name: round(value, 4) for name, value in figures.items()}


def require_equal_answers(figures: Mapping[str, float], most: float) -> None:
    """Raises `WrongMeasurementError` if more than the share `most` of an alternative's answers differs from ours."""
    for name, count in figures.items():
        if name.startswith("mismatched_"):
            answers = figures[name.removeprefix("mismatched_")]
            if count > most * answers:
                raise WrongMeasurementError(f"{name} is {count:.0f} of {answers:.0f}: above the share of {most}")


def round_of(contenders: Mapping[str, Contender], workload: Workload, turned: bool) -> dict[str, Taken]:
    """Measure times and answers of all contenders on the same requests, in this order or reversed."""
    order = list(contenders)
    return {name: contenders[name].answer(workload) for name in (reversed(order) if turned else order)}


def book(samples: dict[str, list[float]], load: str, taken: Mapping[str, Taken]) -> None:
    """Append one round to the series of `samples`."""
    ours = taken[OURS].answers
    for name, one in taken.items():
        samples[f"{load}_{name}_s"].append(one.took_s)
        samples[f"{load}_{name}_tokens_per_s"].append(one.tokens_per_s)
        samples[f"{load}_{name}_requests_per_s"].append(len(one.answers) / one.took_s)
        if name != OURS:
            samples[f"{load}_{name}_answers"].append(len(one.answers))
            samples[f"{load}_{name}_mismatched"].append(mismatched(name, one.answers, ours))


class Alternatives:
    """The processes of all alternatives: for each number of threads, as many as its largest layout needs."""

    def __init__(self, config: AlternativesConfig, brokers: str, log: Path) -> None:
        self._config = config
        self._brokers = brokers
        self._log = log
        self._workers: dict[tuple[str, int], list[Worker]] = {}
        self.facts: dict[str, Any] = {}

    def start(self, names: Iterable[str]) -> None:
        """Start all, and wait until they are warm."""
        needed: dict[int, int] = {}
        for layout in self._config.layouts:
            needed[layout.threads] = max(needed.get(layout.threads, 0), layout.processes)
        for name in names:
            for threads, processes in needed.items():
                workers = self._workers[name, threads] = []
                for _ in range(processes):
                    workers.append(self._worker(name, threads))  # noqa: PERF401 - none is lost if the next fails
        for workers in self._workers.values():
            for worker in workers:
                self.facts = worker.ready()

    def _worker(self, name: str, threads: int) -> Worker:
        config = self._config
        engine = config.job.engine.model_copy(update={"threads": threads})
        return Worker(name, engine, config.batch, self._log / f"{name}.log", config.flink.ready_timeout_s)

    def contender(self, name: str, layout: Layout) -> Contender:
        group = WorkerGroup(self._workers[name, layout.threads][: layout.processes])
        if name == IN_BOTH:
            return OnKafka(group, name, self._brokers, self._config.flink.idle_timeout_s)
        return InProcess(group)

    def close(self) -> None:
        for workers in self._workers.values():
            for worker in workers:
                worker.close()


@contextmanager
def started(config: AlternativesConfig, brokers: str, log: Path) -> Iterator[Alternatives]:
    """Give all alternatives, warm; end them afterwards. Raises `UserError`."""
    alternatives = Alternatives(config, brokers, log)
    try:
        alternatives.start(dict.fromkeys(name for names in LOADS.values() for name in names))
        yield alternatives
    finally:
        alternatives.close()


def measure(config: AlternativesConfig, console: Console) -> Report:
    """Run everything. Raises `UserError`, and `WrongMeasurementError` if answers are not what they should be."""
    check(config)
    # Greedy, whatever the model's defaults are, because the alternatives answer greedily.
    engine = config.job.engine.model_copy(update={"device": "cpu", "sampling_defaults": SamplingDefaults.NEUTRAL})
    job = with_absolute_paths(config.job.model_copy(update={"engine": engine}))
    config = config.model_copy(update={"job": job})
    samples: dict[str, list[float]] = defaultdict(list)
    tried: dict[str, dict[str, dict[Layout, float]]] = {load: {} for load in LOADS}
    neighbours = Neighbours(ours_s=CpuSeconds(config.flink.stack_dir).total_s)
    with ExitStack() as cleanup:
        log = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="alternatives-")))
        bar = cleanup.enter_context(progress(console))
        names = sum(len(of_load) for of_load in LOADS.values())
        task = bar.add_task("starting all", total=names * len(config.layouts) + len(LOADS) * (1 + config.rounds))
        found = cleanup.enter_context(cluster(config.flink, slots=job.parallelism))
        alternatives = cleanup.enter_context(started(config, found.brokers, log))
        ours = OurJob(cleanup.enter_context(running(config.flink, found, "alternatives", job)))
        contenders: dict[str, dict[str, Contender]] = {}
        for load, of_load in LOADS.items():
            bar.update(task, description=f"trials, {load}")
            trial = load_of(config, load, config.trial_requests, config.seed)
            ours.answer(trial)
            bar.advance(task)
            contenders[load] = {OURS: ours}
            for name in of_load:
                tried[load][name] = {}
                for layout in config.layouts:
                    tried[load][name][layout] = alternatives.contender(name, layout).answer(trial).tokens_per_s
                    bar.advance(task)
                contenders[load][name] = alternatives.contender(name, fastest(tried[load][name]))
        sizes = {}
        for index in range(config.rounds):
            for load in LOADS:
                bar.update(task, description=f"round {index + 1}, {load}")
                # New requests in each round, because our cache would still hold those of the last one.
                requests = config.turns if load == MULTI_TURN else config.requests
                workload = load_of(config, load, requests, config.seed + 1 + index)
                book(samples, load, round_of(contenders[load], workload, turned=index % 2 == 1))
                sizes[load] = _sizes(workload)
                bar.advance(task)
        where = conditions_of(alternatives.facts["device"], alternatives.facts["model"], redis_url=None)
        busy_percent = neighbours.busy_percent()
    figures = figures_of(samples)
    require_equal_answers(figures, config.most_mismatched)
    del where["machine"]["threads"]
    return Report(
        benchmark="alternatives",
        **{**where, "versions": where["versions"] | {name: version(name) for name in PACKAGES}},
        rounds=config.rounds,
        settings=config.model_dump(mode="json", exclude={"out", "flink", "job", "layouts"})
        | {
            "trace": None if config.trace is None else config.trace.name,
            "job": job.model_dump(mode="json", exclude={"kafka": True, "cache": {"remote"}}),
            "loads": sizes,
            "tried_tokens_per_s": {
                load: {
                    name: {str(layout): round(reached, 2) for layout, reached in layouts.items()}
                    for name, layouts in of_load.items()
                }
                for load, of_load in tried.items()
            },
            "layout": {
                load: {name: str(fastest(layouts)) for name, layouts in of_load.items()}
                for load, of_load in tried.items()
            },
        },
        figures=figures | {"neighbours_busy_percent": round(busy_percent, 2)},
        samples={name: [round(value, 4) for value in values] for name, values in samples.items()},
    )


def show(report: Report, console: Console) -> None:
    """Print the main figures as a table."""
    figures = report.figures
    table = Table(
        "load", "alternative", "layout", "its\ntokens/s", "ours\ntokens/s", "ours / it", "quartiles", "mismatched"
    )
    for load, alternatives in LOADS.items():
        for name in alternatives:
            suffix = f"_{load}" if name == IN_BOTH else ""
            over = f"over_{name}{suffix}"
            table.add_row(
                load,
                name,
                report.settings["layout"][load][name],
                f"{figures[f'{load}_{name}_tokens_per_s']:.1f}",
                f"{figures[f'{load}_{OURS}_tokens_per_s']:.1f}",
                f"{figures[over]:.2f}",
                f"{figures[f'{over}_p25']:.2f} - {figures[f'{over}_p75']:.2f}",
                f"{figures[f'mismatched_answers_{name}{suffix}']:.0f} of {figures[f'answers_{name}{suffix}']:.0f}",
            )
    console.print(table)
    console.print(f"others kept {figures['neighbours_busy_percent']:.0f} % of the cores busy")


def _sizes(workload: Workload) -> dict[str, float]:
    """Token counts of one round. Text is counted in bytes, which are the tokens of the default model."""
    prompts = [len(timed.prompt_token_ids or (timed.prompt or "").encode()) for timed in workload]
    limits = [timed.max_new_tokens for timed in workload]
    return {
        "requests": len(prompts),
        "mean_prompt_tokens": round(sum(prompts) / len(prompts), 1),
        "mean_max_new_tokens": round(sum(limits) / len(limits), 1),
    }


def main() -> None:
    carry_out(COMMAND.parse(), measure, show)


if __name__ == "__main__":
    exit_on_user_error(main)

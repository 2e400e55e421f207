"""Balanced against session placement on a skewed load: most sessions have the same default slot of two.

    python -m benchmarks.placement --out results/benchmarks/placement.json

Two jobs of two slots each are ready side by side. In one, every session goes to its default slot. In the other, a new
session avoids an overloaded default slot. One job at a time gets the same conversations at even gaps; the order
alternates from round to round. Latency is the time from a request's creation until its answer was read from Kafka. A
figure is written beside the report.

The rate should be above the throughput of one slot and below that of both. Then slot 0 is overloaded as default slot,
but no slot is if the load is shared. Both throughputs are measured first, each with a backlog: all sessions have
default slot 0, or half of them. `slot0_offered_over_one_slot` should be above 1 and `offered_over_both_slots` below;
choose `--rate-per-s` by them. The queue of an overloaded slot grows while the load lasts, so the ratios of latency hold
only for a load of this length.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from pydantic import Field
from rich.console import Console
from rich.table import Table

from benchmarks.batching import by_round
from benchmarks.command import carry_out, progress, stated
from benchmarks.on_flink import CpuSeconds, FlinkConfig, JobUnderTest, ReceivedResponse, cluster, running
from benchmarks.placement_figure import placement_figure
from benchmarks.report import Neighbours, Report, conditions_of, ratios, spread
from benchmarks.reuse_probe import WrongMeasurementError
from core.config import Config
from core.errors import UserError, exit_on_user_error
from inference_service.config import EngineConfig
from operators.config import JobConfig, Placement, PlacementConfig
from operators.job_files import with_absolute_paths
from workloads.independent import session_with_default_slot
from workloads.timed_request import TimedRequest, Workload, request_id
from workloads.token_ids import made_token_ids

PLACEMENTS = (Placement.SESSION, Placement.BALANCED)
SLOTS = 2
WARM_SEED = 1 << 42
CAPACITIES = {"one_slot": (1.0, 1 << 40), "both_slots": (0.5, 1 << 41)}
"""Skew and seed of the backlogs. Seeds are added to `--seed`, so no two loads of a job share a request or a session."""
WARM_SESSIONS = 4

Samples = dict[str, list[float]]


class PlacementEngine(EngineConfig):
    """The model of both jobs."""

    threads: int = Field(default=1, ge=1, le=1024, description="CPU threads of a slot's engine")


class PlacementBenchmarkConfig(Config):
    """The loads, and how often they are measured."""

    out: Path = Field(
        default=Path("results/benchmarks/placement.json"),
        description="path of the report; a figure is written beside it",
    )
    rounds: int = Field(default=4, ge=1, description="measured rounds")
    sessions: int = Field(default=60, ge=1, description="sessions of a round")
    turns: int = Field(default=3, ge=1, description="requests of a session")
    skew: float = Field(default=0.9, ge=0.5, le=1, description="share of the sessions whose default slot is 0")
    rate_per_s: float = Field(
        default=5.0, gt=0, description="rate of all requests: above the throughput of one slot, below that of two"
    )
    turn_gap_ms: float = Field(default=2000.0, gt=0, description="time between two turns of a session")
    prompt_tokens: int = Field(default=128, ge=1, description="prompt of a session's first turn")
    turn_tokens: int = Field(default=64, ge=1, description="tokens that each later turn adds to the prompt")
    answer_tokens: int = Field(default=16, ge=1, description="length of an answer")
    seed: int = Field(default=0, ge=0, lt=1 << 32, description="random seed of the requests")
    engine: PlacementEngine = PlacementEngine()
    flink: FlinkConfig = FlinkConfig()

    @property
    def figure(self) -> Path:
        return self.out.with_suffix(".png")


class SkewedSessions:
    """Sessions that begin at even gaps, with turns `turn_gap_ms` apart. Sessions of slot 1 are spread evenly.

    The load has its full rate from the last turn of the first session to the beginning of the last session.
    """

    def __init__(self, config: PlacementBenchmarkConfig, seed: int) -> None:
        self._config = config
        self._seed = config.seed + seed

    @property
    def requests(self) -> int:
        return self._config.sessions * self._config.turns

    def adjustments(self) -> Mapping[str, int]:
        return {}

    def __iter__(self) -> Iterator[TimedRequest]:
        turns = (timed for session in range(self._config.sessions) for timed in self._turns(session))
        yield from sorted(turns, key=lambda timed: timed.at_ms)

    def _turns(self, session: int) -> Iterator[TimedRequest]:
        config = self._config
        user_id = f"user-{self._seed}-{session + 1:06d}"
        session_id = session_with_default_slot(user_id, self._default_slot(session), SLOTS)
        for turn in range(config.turns):
            # Fewer tokens of a name are a prefix of more tokens, so each prompt begins with the one before.
            tokens = config.prompt_tokens + turn * config.turn_tokens
            yield TimedRequest(
                at_ms=1000 * session * config.turns / config.rate_per_s + turn * config.turn_gap_ms,
                request_id=request_id("placement", self._seed, session * config.turns + turn),
                session_id=session_id,
                user_id=user_id,
                max_new_tokens=config.answer_tokens,
                prompt_token_ids=made_token_ids(self._seed, user_id, tokens, vocab_size=256),
            )

    def _default_slot(self, session: int) -> int:
        sessions = self._config.sessions
        at_zero = round(self._config.skew * sessions)
        return 1 - ((session + 1) * at_zero // sessions - session * at_zero // sessions)


def job_of(placement: Placement, engine: EngineConfig) -> JobConfig:
    """Return the default job, with continuous batching. Slots share queue lengths and chunks through Redis."""
    return JobConfig(parallelism=SLOTS, engine=engine, placing=PlacementConfig(placement=placement))


def check(config: PlacementBenchmarkConfig) -> None:
    """Raises `UserError` for options that would fail or mislead after everything has started."""
    if config.engine.is_simulated:
        raise UserError("--engine: placement is compared on a real engine; leave it out")
    if config.out == config.figure:
        raise UserError(f"--out: {config.out} is where the figure goes; name a file that ends in .json")
    at_zero = config.skew * config.sessions
    if abs(at_zero - round(at_zero)) > 1e-6:
        raise UserError(
            f"--skew: {config.skew:g} of {config.sessions} are not whole sessions; choose --sessions so that they are"
        )
    longest = config.prompt_tokens + (config.turns - 1) * config.turn_tokens + config.answer_tokens
    if longest > config.engine.max_model_len:
        raise UserError(
            f"--turns: the last one's prompt and answer have {longest} tokens, more than --max-model-len, "
            f"{config.engine.max_model_len}; give fewer or shorter turns"
        )


def measure(config: PlacementBenchmarkConfig, console: Console) -> Report:
    """Run everything. Raises `UserError`, and `WrongMeasurementError` if a session did not stay where it began."""
    check(config)
    engine = with_absolute_paths(job_of(Placement.SESSION, config.engine)).engine
    samples: Samples = defaultdict(list)
    cpu = CpuSeconds(config.flink.stack_dir)
    with ExitStack() as cleanup:
        found = cleanup.enter_context(cluster(config.flink, slots=SLOTS * len(PLACEMENTS), remote=True))
        neighbours = Neighbours(ours_s=cpu.total_s)
        bar = cleanup.enter_context(progress(console))
        jobs: dict[Placement, JobUnderTest] = {}
        for placement in bar.track(PLACEMENTS, description="starting jobs"):
            job = job_of(placement, engine)
            jobs[placement] = cleanup.enter_context(running(config.flink, found, placement, job))
        ready = jobs[Placement.SESSION].slots[0]
        device = {"threads": config.engine.threads, "device": ready.device}
        where = conditions_of(device, {"name": ready.model, "dtype": ready.dtype}, found.redis_url)
        few = config.model_copy(update={"sessions": WARM_SESSIONS, "skew": 0.5})
        for placement in bar.track(PLACEMENTS, description="warming up"):
            jobs[placement].offer(SkewedSessions(few, WARM_SEED), backlog=True)
        for name, (skew, seed) in bar.track(CAPACITIES.items(), description="capacity"):
            work = SkewedSessions(config.model_copy(update={"skew": skew}), seed)
            outcome = jobs[Placement.SESSION].offer(work, backlog=True)
            samples[f"{name}_requests_per_s"].append(outcome.requests_per_s)
        for round_ in bar.track(range(config.rounds), description="rounds"):
            work = SkewedSessions(config, round_)
            samples["at_ms"] += [timed.at_ms for timed in work]
            for placement in PLACEMENTS if round_ % 2 == 0 else reversed(PLACEMENTS):
                offer(jobs[placement], work, samples)
        busy_percent = neighbours.busy_percent()
    return Report(
        benchmark="placement",
        **where,
        rounds=config.rounds,
        settings=config.model_dump(mode="json", exclude={"out", "flink"})
        | job_of(Placement.BALANCED, engine).model_dump(mode="json", include={"parallelism", "batching", "cache"})
        | {"placements": {name: job_of(name, engine).placing.model_dump(mode="json") for name in PLACEMENTS}},
        figures=figures_of(samples, config) | {"neighbours_busy_percent": round(busy_percent, 2)},
        samples={name: [round(value, 4) for value in values] for name, values in samples.items()},
    )


def offer(job: JobUnderTest, work: Workload, samples: Samples) -> None:
    """Send one load to one job. Its series are in the order of the load, so they pair with those of the other job.

    Raises `WrongMeasurementError` if a session was answered at more than one slot.
    """
    outcome = job.offer(work, backlog=False)
    by_id = {answer.response.request_id: answer for answer in outcome.answers}
    answers = [by_id[timed.request_id] for timed in work]
    if (share := split_share(answers)) > 0:
        raise WrongMeasurementError(f"{job.name}: {share:.1%} of the sessions were answered at more than one slot")
    samples[f"{job.name}_requests_per_s"].append(outcome.requests_per_s)
    samples[f"{job.name}_split_sessions_share"].append(share)
    for answer in answers:
        response = answer.response
        samples[f"{job.name}_e2e_ms"].append(answer.e2e_ms)
        samples[f"{job.name}_slot"].append(response.slot)
        samples[f"{job.name}_prompt_tokens"].append(response.prompt_tokens)
        samples[f"{job.name}_reused_tokens"].append(response.local_tokens + response.remote_tokens)


def split_share(answers: Sequence[ReceivedResponse]) -> float:
    """Share of the sessions that were answered at more than one slot."""
    slots: dict[str, set[int]] = defaultdict(set)
    for answer in answers:
        slots[answer.response.session_id].add(answer.response.slot)
    return sum(len(at) > 1 for at in slots.values()) / len(slots)


def figures_of(samples: Mapping[str, Sequence[float]], config: PlacementBenchmarkConfig) -> dict[str, float]:
    """Figures of the report: medians with quartiles of values and ratios taken round by round."""
    rounds = config.rounds
    of_rounds: dict[Placement, dict[str, Sequence[float]]] = {}
    for placement in PLACEMENTS:
        slots, prompt, reused = (
            np.reshape(samples[f"{placement}_{name}"], (rounds, -1))
            for name in ("slot", "prompt_tokens", "reused_tokens")
        )
        of_rounds[placement] = {
            "p50_ms": by_round(samples[f"{placement}_e2e_ms"], rounds, 50),
            "p95_ms": by_round(samples[f"{placement}_e2e_ms"], rounds, 95),
            "requests_per_s": samples[f"{placement}_requests_per_s"],
            "slot0_share": (slots == 0).mean(axis=1).tolist(),
            "split_sessions_share": samples[f"{placement}_split_sessions_share"],
            "token_hit_rate_percent": (100 * reused.sum(axis=1) / prompt.sum(axis=1)).tolist(),
        }
    session, balanced = (of_rounds[placement] for placement in PLACEMENTS)
    figures = spread("session_over_balanced_p95", ratios(session["p95_ms"], balanced["p95_ms"]))
    figures |= spread("session_over_balanced_p50", ratios(session["p50_ms"], balanced["p50_ms"]))
    throughputs = ratios(balanced["requests_per_s"], session["requests_per_s"])
    figures |= spread("balanced_over_session_throughput", throughputs)
    for placement, values in of_rounds.items():
        for name, value in values.items():
            figures |= spread(f"{placement}_{name}", value)
    figures |= {f"{name}_requests_per_s": samples[f"{name}_requests_per_s"][0] for name in CAPACITIES}
    figures["slot0_offered_over_one_slot"] = config.skew * config.rate_per_s / figures["one_slot_requests_per_s"]
    figures["offered_over_both_slots"] = config.rate_per_s / figures["both_slots_requests_per_s"]
    return {name: round(value, 4) for name, value in figures.items()}


def show(report: Report, console: Console) -> None:
    """Print the main figures."""
    figures = report.figures
    columns = ("p50_ms", "p95_ms", "requests_per_s", "slot0_share", "token_hit_rate_percent")
    table = Table("", *(name.replace("_", " ") for name in columns))
    for placement in PLACEMENTS:
        table.add_row(placement, *(f"{figures[f'{placement}_{name}']:,.4g}" for name in columns))
    console.print(table)
    for name in ("session_over_balanced_p95", "session_over_balanced_p50", "balanced_over_session_throughput"):
        console.print(f"{name}: {figures[name]:.2f} ({figures[f'{name}_p25']:.2f} to {figures[f'{name}_p75']:.2f})")
    console.print(
        f"slot 0 was offered {figures['slot0_offered_over_one_slot']:.2f} of one slot's throughput, both together "
        f"{figures['offered_over_both_slots']:.2f} of the throughput of both; others kept "
        f"{figures['neighbours_busy_percent']:.0f} % of the cores busy"
    )


def main() -> None:
    config = stated(PlacementBenchmarkConfig, "benchmarks.placement", "Balanced against session placement.")

    def draw_and_show(report: Report, console: Console) -> None:
        placement_figure(report, config.figure)
        show(report, console)

    carry_out(config, measure, draw_and_show)


if __name__ == "__main__":
    exit_on_user_error(main)

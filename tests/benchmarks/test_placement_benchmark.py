"""The placement benchmark without Flink: its load, its figures from given samples, its drawing, its refusals."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import pytest
from made_job import MadeCpuSeconds, MadeJob, made_answer

from benchmarks import placement
from benchmarks.on_flink import FlinkConfig, LoadResult, ReceivedResponse
from benchmarks.placement import PLACEMENTS, SLOTS, PlacementBenchmarkConfig, SkewedSessions
from benchmarks.placement_figure import SLOT_COLOURS, caption, placement_figure
from benchmarks.report import Report
from benchmarks.reuse_probe import WrongMeasurementError
from core.default_slot import default_slot
from core.errors import UserError
from operators.config import Batching, JobConfig, Placement
from workloads.timed_request import TimedRequest, Workload

SMALL = PlacementBenchmarkConfig(rounds=2, sessions=10, turns=3, rate_per_s=6.0, turn_gap_ms=700.0)


def by_session(load: Workload) -> dict[str, list[TimedRequest]]:
    """Requests by session, in the order in which the sessions begin."""
    sessions: dict[str, list[TimedRequest]] = defaultdict(list)
    for timed in load:
        sessions[timed.session_id].append(timed)
    return sessions


def made_samples() -> dict[str, list[float]]:
    """Two rounds of four requests. Session: 90 % are slot 0's; balanced: half of them, and four times as fast."""
    samples = {
        "at_ms": [0.0, 500.0, 1000.0, 1500.0] * 2,
        "one_slot_requests_per_s": [4.0],
        "both_slots_requests_per_s": [8.0],
    }
    for name, slots, e2e_ms, rate in (
        (Placement.SESSION, [0, 0, 0, 1], 400.0, 2.0),
        (Placement.BALANCED, [0, 1, 0, 1], 100.0, 3.0),
    ):
        samples |= {
            f"{name}_e2e_ms": [e2e_ms] * 4 + [2 * e2e_ms] * 4,
            f"{name}_slot": [float(slot) for slot in slots * 2],
            f"{name}_prompt_tokens": [100.0] * 8,
            f"{name}_reused_tokens": [0.0, 40.0, 0.0, 60.0] + [50.0] * 4,
            f"{name}_requests_per_s": [rate, 2 * rate],
            f"{name}_split_sessions_share": [0.0, 0.0],
        }
    return samples


def made_report() -> Report:
    samples = made_samples()
    return Report(
        benchmark="placement",
        command="made",
        started_at="now",
        machine={"device": "made-device", "threads": 1},
        versions={},
        model={"name": "made-model"},
        rounds=2,
        settings=SMALL.model_dump(mode="json", exclude={"out", "flink"}) | {"placements": {p: {} for p in PLACEMENTS}},
        figures=placement.figures_of(samples, SMALL),
        samples=samples,
    )


class PlacedJob(MadeJob):
    """Answers at the default slots, or at the slots in turn; request `lost` is answered away from its session."""

    lost: str | None = None
    later_ms = 0.0
    """Delay of slot 1 against slot 0."""

    def __init__(self, name: str, job: JobConfig) -> None:
        super().__init__(name, job)
        self._balanced = job.placing.placement is Placement.BALANCED

    def offer(self, workload: Workload, *, backlog: bool) -> LoadResult:
        outcome = super().offer(workload, backlog=backlog)
        slots: dict[str, int] = {}
        answers = []
        for timed, answer in zip(workload, outcome.answers, strict=True):
            here = len(slots) % SLOTS if self._balanced else default_slot(timed.session_id, SLOTS)
            slot = slots.setdefault(timed.session_id, here)
            if not backlog and timed.request_id == self.lost:
                slot = 1 - slot
            later = replace(answer, received_ms=answer.received_ms + slot * self.later_ms)
            answers.append(at(later, timed.session_id, slot))
        return replace(outcome, answers=tuple(sorted(answers, key=lambda one: one.received_ms)))


def at(answer: ReceivedResponse, session_id: str, slot: int) -> ReceivedResponse:
    counts = {"prompt_tokens": 10, "local_tokens": 3, "remote_tokens": 1, "computed_tokens": 6}
    response = answer.response.model_copy(update={"session_id": session_id, "slot": slot, **counts})
    return replace(answer, response=response)


@pytest.fixture
def made_stack(monkeypatch: pytest.MonkeyPatch) -> dict[str, JobConfig]:
    """Run a benchmark on `PlacedJob`s; give the started jobs by name."""
    started: dict[str, JobConfig] = {}

    @contextmanager
    def cluster(_flink: FlinkConfig, slots: int, *, remote: bool) -> Iterator[SimpleNamespace]:
        assert (slots, remote) == (4, True)
        yield SimpleNamespace(redis_url=None)

    @contextmanager
    def running(_flink: object, _found: object, name: str, job: JobConfig) -> Iterator[PlacedJob]:
        started[name] = job
        yield PlacedJob(name, job)

    for name, made in (("cluster", cluster), ("running", running), ("CpuSeconds", MadeCpuSeconds)):
        monkeypatch.setattr(placement, name, made)
    return started


@pytest.mark.parametrize(("skew", "sessions"), [(0.9, 60), (0.9, 10), (0.5, 60), (0.8, 5), (1.0, 7)])
def test_the_share_of_sessions_with_default_slot_0_is_exact(skew: float, sessions: int) -> None:
    load = SkewedSessions(PlacementBenchmarkConfig(skew=skew, sessions=sessions), 0)
    homes = [default_slot(session, SLOTS) for session in by_session(load)]
    assert len(homes) == sessions
    assert homes.count(0) == round(skew * sessions)


def test_sessions_of_slot_1_are_spread_evenly() -> None:
    homes = [default_slot(session, SLOTS) for session in by_session(SkewedSessions(PlacementBenchmarkConfig(), 0))]
    ones = [place for place, home in enumerate(homes) if home == 1]
    assert {later - one for one, later in pairwise(ones)} == {10}


def test_each_turn_extends_the_one_before_and_sessions_share_nothing() -> None:
    sessions = by_session(SkewedSessions(SMALL, 0))
    firsts = set()
    for turns in sessions.values():
        prompts = [timed.prompt_token_ids or () for timed in turns]
        assert [len(prompt) for prompt in prompts] == [128, 192, 256]
        assert prompts[1][:128] == prompts[0]
        assert prompts[2][:192] == prompts[1]
        firsts.add(prompts[0][:16])
    assert len(firsts) == 10
    assert {timed.max_new_tokens for turns in sessions.values() for timed in turns} == {16}


def test_sessions_begin_at_even_gaps_and_turns_come_at_theirs() -> None:
    load = list(SkewedSessions(SMALL, 0))
    assert len(load) == SkewedSessions(SMALL, 0).requests == 30
    assert [timed.at_ms for timed in load] == sorted(timed.at_ms for timed in load)
    sessions = list(by_session(SkewedSessions(SMALL, 0)).values())
    # Three requests each, at 6 per second in all.
    assert [turns[0].at_ms for turns in sessions] == pytest.approx([500.0 * place for place in range(10)])
    for turns in sessions:
        assert [timed.at_ms - turns[0].at_ms for timed in turns] == pytest.approx([0.0, 700.0, 1400.0])


def test_one_seed_is_one_load_and_two_share_no_request_and_no_session() -> None:
    assert list(SkewedSessions(SMALL, 3)) == list(SkewedSessions(SMALL, 3))
    seeds = [0, 1, placement.WARM_SEED, *(seed for _, seed in placement.CAPACITIES.values())]
    loads = [list(SkewedSessions(SMALL, seed)) for seed in seeds]
    assert len({timed.request_id for load in loads for timed in load}) == 30 * len(seeds)
    assert len({timed.session_id for load in loads for timed in load}) == 10 * len(seeds)
    assert len({timed.prompt_token_ids for load in loads for timed in load}) == 30 * len(seeds)


def test_the_jobs_differ_in_placement_only() -> None:
    session, balanced = (placement.job_of(name, PlacementBenchmarkConfig().engine) for name in PLACEMENTS)
    assert session.placing.placement is Placement.SESSION
    assert balanced.placing.placement is Placement.BALANCED
    assert session.model_copy(update={"placing": balanced.placing}) == balanced
    assert (balanced.parallelism, balanced.engine.threads) == (2, 1)
    assert balanced.batching.batching is Batching.CONTINUOUS
    assert balanced.cache.cache


def test_ratios_are_taken_round_by_round() -> None:
    figures = placement.figures_of(made_samples(), SMALL)
    assert figures["session_over_balanced_p95"] == figures["session_over_balanced_p50"] == 4.0
    assert figures["balanced_over_session_throughput"] == 1.5
    assert [figures[f"session_p95_ms{which}"] for which in ("", "_p25", "_p75")] == [600.0, 500.0, 700.0]
    assert figures["balanced_p50_ms"] == 150.0
    assert figures["balanced_requests_per_s"] == 4.5
    assert (figures["session_slot0_share"], figures["balanced_slot0_share"]) == (0.75, 0.5)
    # 100 of 400 tokens in the first round, 200 in the second.
    assert figures["session_token_hit_rate_percent"] == 37.5
    assert figures["session_split_sessions_share"] == figures["balanced_split_sessions_share"] == 0.0


def test_the_rate_is_stated_in_parts_of_what_the_slots_take() -> None:
    figures = placement.figures_of(made_samples(), SMALL)
    assert figures["slot0_offered_over_one_slot"] == 0.9 * 6 / 4
    assert figures["offered_over_both_slots"] == 6 / 8


def test_a_session_is_split_that_was_answered_at_two_slots() -> None:
    answer = made_answer(0.0, 10.0)
    placed = [at(answer, session, slot) for session, slot in (("a", 0), ("a", 0), ("b", 1), ("c", 1))]
    assert placement.split_share(placed) == 0.0
    assert placement.split_share([*placed, at(answer, "b", 0)]) == 1 / 3


def test_a_session_at_two_slots_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    last = list(SkewedSessions(SMALL, 0))[-1]
    monkeypatch.setattr(PlacedJob, "lost", last.request_id)
    job = PlacedJob(Placement.SESSION, placement.job_of(Placement.SESSION, SMALL.engine))
    samples: placement.Samples = defaultdict(list)
    with pytest.raises(WrongMeasurementError, match=r"session: 10\.0% of the sessions were answered at more than one"):
        placement.offer(job, SkewedSessions(SMALL, 0), samples)  # type: ignore[arg-type]
    assert not samples


def test_a_job_s_series_are_in_the_order_of_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlacedJob, "later_ms", 5000.0)
    job = PlacedJob(Placement.SESSION, placement.job_of(Placement.SESSION, SMALL.engine))
    samples: placement.Samples = defaultdict(list)
    work = SkewedSessions(SMALL, 0)
    placement.offer(job, work, samples)  # type: ignore[arg-type]
    homes = [default_slot(timed.session_id, SLOTS) for timed in work]
    # Slot 1 has some of the first requests, and its answers come last.
    assert homes.index(1) < 25
    assert samples["session_slot"] == homes
    assert samples["session_e2e_ms"] == pytest.approx([5010.0 if home else 10.0 for home in homes])
    assert samples["session_reused_tokens"] == [4] * 30


def test_a_whole_run_on_made_jobs_writes_report_and_figure(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    made_stack: dict[str, JobConfig],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "made" / "placement.json"
    monkeypatch.setattr(sys, "argv", ["placement", f"--out={out}", "--rounds=3", "--sessions=20"])
    placement.main()
    report = json.loads(out.read_text())
    figures = report["figures"]
    assert list(made_stack) == ["session", "balanced"]
    # Both have the same speed here.
    assert figures["session_over_balanced_p95"] == figures["balanced_over_session_throughput"] == 1.0
    assert (figures["session_slot0_share"], figures["balanced_slot0_share"]) == (0.9, 0.5)
    assert figures["session_token_hit_rate_percent"] == 40.0
    assert figures["one_slot_requests_per_s"] == figures["both_slots_requests_per_s"] == 100.0
    assert figures["slot0_offered_over_one_slot"] == 0.045
    assert {len(report["samples"][name]) for name in ("at_ms", "session_e2e_ms", "balanced_slot")} == {180}
    assert report["settings"]["placements"]["balanced"]["overload_ms"] == 500
    assert report["settings"]["cache"]["remote"]["redis_url"] is None
    assert plt.imread(out.with_suffix(".png")).shape[1] == 14 * 130
    assert "session_over_balanced_p95: 1.00" in capsys.readouterr().out


def test_the_order_of_the_jobs_alternates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, made_stack: object) -> None:
    offered: list[str] = []
    offer = placement.offer

    def noted(job: Any, *rest: Any) -> None:
        offered.append(job.name)
        offer(job, *rest)

    monkeypatch.setattr(placement, "offer", noted)
    out = tmp_path / "placement.json"
    monkeypatch.setattr(sys, "argv", ["placement", f"--out={out}", "--rounds=3", "--sessions=10"])
    placement.main()
    assert offered == ["session", "balanced", "balanced", "session", "session", "balanced"]


def test_the_figure_shows_every_request_in_the_colour_of_its_slot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[tuple[list[float], list[float], list[str]]] = []

    def scatter(_axes: object, x: Any, y: Any, *, color: list[str], **_: Any) -> None:
        drawn.append((x.tolist(), y.tolist(), color))

    monkeypatch.setattr("matplotlib.axes.Axes.scatter", scatter)
    placement_figure(made_report(), tmp_path / "placement.png")
    (times, session_s, session_colours), (_, balanced_s, balanced_colours) = drawn
    blue, orange = SLOT_COLOURS
    assert times == [0.0, 0.5, 1.0, 1.5] * 2
    assert session_s == [0.4] * 4 + [0.8] * 4
    assert balanced_s == [0.1] * 4 + [0.2] * 4
    assert session_colours == [blue, blue, blue, orange] * 2
    assert balanced_colours == [blue, orange] * 4


def test_the_figure_is_written_and_not_empty(tmp_path: Path) -> None:
    path = tmp_path / "placement.png"
    placement_figure(made_report(), path)
    image = plt.imread(path)
    colours = {tuple(round(255 * float(part)) for part in pixel[:3]) for pixel in image.reshape(-1, 4)[::7]}
    assert image.shape[:2] == (806, 1820)
    assert len(colours) > 20


def test_the_caption_says_what_the_figure_holds_for() -> None:
    said = caption(made_report())
    for fact in (
        "model made-model",
        "device made-device, threads of a slot 1",
        "10 sessions of 3 turns, 90% with default slot 0",
        "rounds 2, seed 0",
        "prompts of 128 to 256 tokens, answers of 16",
        "6 requests/s offered, fewer in the first and last 1.4 s",
        "from a backlog one slot takes 4.0, both 8.0",
    ):
        assert fact in said
    assert max(len(line) for line in said.splitlines()) < 165


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engine=simulated", "--profile=x.json"], "--engine: placement is compared on a real engine; leave it out"),
        (["--skew=0.9", "--sessions=25"], "--skew: 0.9 of 25 are not whole sessions; choose --sessions so that"),
        (["--skew=1.2"], "--skew: Input should be less than or equal to 1"),
        (["--rate-per-s=0"], "--rate-per-s: Input should be greater than 0"),
        (
            ["--turns=40"],
            "--turns: the last one's prompt and answer have 2640 tokens, more than --max-model-len, 2048; ",
        ),
        (["--out=x.png"], "--out: x.png is where the figure goes; name a file that ends in .json"),
        (["--model=/nonexistent/model"], "--model: no config.json in '/nonexistent/model'; give the folder"),
    ],
)
def test_bad_options_are_refused_before_anything_is_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str], said: str
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("started")

    monkeypatch.setattr(placement, "cluster", never)
    monkeypatch.setattr(sys, "argv", ["placement", f"--out={tmp_path / 'x.json'}", *options])
    with pytest.raises(UserError) as refused:
        placement.main()
    assert said in str(refused.value)

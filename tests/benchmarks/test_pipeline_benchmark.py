"""The pipeline benchmark without Flink: its figures from given samples, its loads, and its refusals."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from made_job import MadeCpuSeconds, MadeJob, made_answer, made_cluster, made_load_result, made_running

from benchmarks import pipeline, zero_engine
from benchmarks.baselines.worker import Answers, Order
from benchmarks.on_flink import Drained, OperatorTimes
from benchmarks.zero_engine import ZeroLoads
from core.default_slot import default_slot
from core.errors import UserError
from core.kafka_config import KafkaConfig
from core.records import Request
from inference_service.config import EngineConfig
from operators.config import JobConfig
from workloads.timed_request import Workload

SAMPLES = {
    "pipeline_tokens_per_s": [90.0, 160.0, 85.0],
    "bare_tokens_per_s": [100.0, 200.0, 100.0],
    "pipeline_requests_per_s": [3.0, 5.0, 4.0],
    "alone_ms": [100.0, 200.0],
    "alone_again_ms": [110.0, 210.0],
    "e2e_ms": [125.0, 245.0],
    "inference_ms": [105.0, 215.0],
    "records_per_s_zero_engine_p1": [1500.0],
    "operator_0_busy_percent_zero_engine_p1": [40.0],
}


def test_the_saturation_ratio_is_the_median_of_each_round_s_own() -> None:
    figures = pipeline.figures_of(SAMPLES)
    assert figures["saturation_ratio"] == 0.85
    assert (figures["saturation_ratio_p25"], figures["saturation_ratio_p75"]) == (0.825, 0.875)
    assert figures["pipeline_requests_per_s"] == 4.0


def test_added_latency_is_the_difference_of_each_request_to_itself_alone() -> None:
    figures = pipeline.figures_of(SAMPLES)
    assert figures["added_latency_p50_ms"] == 30.0
    assert figures["added_latency_p95_ms"] == 39.0
    assert figures["alone_p50_ms"] == 155.0
    assert figures["outside_engine_p50_ms"] == 25.0
    assert figures["alone_difference_p95_ms"] == 10.0


def test_light_loads_are_short_and_share_no_request_with_another() -> None:
    loads = pipeline.light_loads(pipeline.PipelineConfig(latency_requests=30))
    timed = [one for load in loads for one in load]
    assert len({one.request_id for one in timed}) == len(loads) == 30
    assert 20 < sum(len(one.prompt_token_ids or ()) for one in timed) / 30 < 45
    assert sum(one.max_new_tokens for one in timed) / 30 < 7


def test_what_the_zero_time_engine_gave_stands_among_the_figures() -> None:
    figures = pipeline.figures_of(SAMPLES)
    assert figures["records_per_s_zero_engine_p1"] == 1500.0
    assert figures["operator_0_busy_percent_zero_engine_p1"] == 40.0


def test_loads_of_one_job_share_no_request_and_lengths_vary_within_the_model_s_limit() -> None:
    config = pipeline.PipelineConfig()
    loads = [list(pipeline.load(config, 64, seed)) for seed in (0, 1, pipeline.LATENCY_SEED, pipeline.WARM_SEED)]
    ids = [timed.request_id for load in loads for timed in load]
    assert len(set(ids)) == len(ids)
    totals = {len(timed.prompt_token_ids or ()) + timed.max_new_tokens for load in loads for timed in load}
    assert len(totals) > 10
    assert max(totals) <= config.engine.max_model_len


def test_the_zero_time_engine_s_records_are_spread_evenly_over_the_slots() -> None:
    loads = ZeroLoads(100, seed=7)
    first, second = list(loads.next(2)), list(loads.next(2))
    for load in (first, second):
        assert [default_slot(timed.session_id, 2) for timed in load] == [0, 1] * 50
        assert {(len(timed.prompt_token_ids or ()), timed.max_new_tokens) for timed in load} == {(1, 1)}
    assert len({timed.request_id for timed in first + second}) == 200


def test_a_load_takes_from_the_first_hand_over_to_the_last_answer_read() -> None:
    outcome = made_load_result(made_answer(1000.0, 1500.0), made_answer(1001.0, 2000.0), made_answer(1002.0, 3000.0))
    assert outcome.took_s == 2.0
    assert outcome.tokens_per_s == 6.0
    assert outcome.requests_per_s == 1.5
    assert [one.e2e_ms for one in outcome.answers] == [500.0, 999.0, 1998.0]


def test_the_draining_rate_counts_all_answers() -> None:
    assert Drained(2.0, (b"",) * 5).records_per_s == 2.5


def test_a_request_that_is_answered_twice_is_told() -> None:
    answers = [made_answer(0.0, 1.0, request_id=name).response.to_json().encode() for name in ("a", "b", "b")]
    zero_engine.require_each_once(Drained(1.0, tuple(answers[:2])))
    with pytest.raises(UserError, match="zero_engine: 3 answers belong to 2 requests"):
        zero_engine.require_each_once(Drained(1.0, tuple(answers)))


def test_the_ratio_to_the_pass_through_job_is_the_median_of_each_round_s_own() -> None:
    ours, passed = [50.0, 90.0, 80.0], [100.0, 100.0, 200.0]
    figures = zero_engine.figures_of(
        {"records_per_s_zero_engine_p2": ours, "records_per_s_pass_through_p2": passed, "records_per_s_loop": [7.0]}
    )
    assert figures["zero_engine_over_pass_through_p2"] == 0.5
    assert (figures["records_per_s_zero_engine_p2"], figures["records_per_s_loop"]) == (80.0, 7.0)
    assert not any(name.endswith("_p1") for name in figures)


def test_operator_shares_are_of_the_load_s_time_and_add_up() -> None:
    before, after = OperatorTimes(2, 1000.0, 0.0), OperatorTimes(2, 3000.0, 500.0)
    assert after.shares(before, took_s=5.0) == {"busy": 20.0, "backpressured": 5.0, "idle": 75.0}


class MadeBareEngine:
    def facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"threads": 1, "device": "cpu"}, {"name": "made", "parameters": 1, "dtype": "float32"}

    def together(self, requests: Sequence[Request]) -> tuple[int, float]:
        return sum(request.max_new_tokens for request in requests), 0.008 * len(requests)

    def alone_ms(self, requests: Sequence[Request]) -> list[float]:
        return [4.0] * len(requests)


class MadeWorker:
    """A baseline's process that checks the order of calls."""

    def __init__(
        self, module: str, engine: EngineConfig, batch: int, log: Path, timeout_s: float, *, zero_time: bool
    ) -> None:
        assert zero_time, "it would load a model"
        self._said: list[str] = []

    def ready(self) -> None:
        self._said.append("ready")

    def prepare(self, order: Order) -> None:
        assert order.brokers == "made:9092"
        self._said.append("prepare")

    def go(self) -> None:
        self._said.append("go")

    def stop(self) -> None:
        self._said.append("stop")

    def done(self) -> None:
        self._said.append("done")

    def close(self) -> None:
        assert self._said[0] == "ready"
        assert self._said[1:] == ["prepare", "go", "stop", "done"] * (len(self._said) // 4)


class MadeGroup:
    """Answers a request in 2 ms."""

    def __init__(self, workers: Sequence[MadeWorker]) -> None:
        pass

    def answer(self, orders: Sequence[Order]) -> tuple[float, Answers]:
        answers: Answers = {request.request_id: [0] for order in orders for request in order.requests}
        return 0.002 * len(answers), answers


def made_drain(kafka: KafkaConfig, reader: object, workload: Workload, idle_timeout_s: float, name: str) -> Drained:
    """Answers one record per 4 ms."""
    return MadeJob(name, JobConfig(kafka=kafka), pace_ms=4.0).drain(workload)


def test_a_whole_run_on_a_made_job_writes_a_complete_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def bare(_job: JobConfig) -> Iterator[MadeBareEngine]:
        yield MadeBareEngine()

    for name, made in (
        ("bare_engine", bare),
        ("cluster", made_cluster),
        ("running", made_running),
        ("CpuSeconds", MadeCpuSeconds),
    ):
        monkeypatch.setattr(pipeline, name, made)
    for name, instead in (
        ("running", made_running),
        ("drain", made_drain),
        ("fresh_topics", made_cluster),
        ("reading", made_cluster),
        ("Worker", MadeWorker),
        ("WorkerGroup", MadeGroup),
    ):
        monkeypatch.setattr(zero_engine, name, instead)
    out = tmp_path / "made" / "pipeline.json"
    monkeypatch.setattr(sys, "argv", ["pipeline", f"--out={out}", "--rounds=2", "--requests=8", "--records=500"])
    pipeline.main()
    report = json.loads(out.read_text())
    figures = report["figures"]
    # One answer per 10 ms against one per 8 ms; latency 10 ms through the pipeline against 4 ms alone.
    assert figures["saturation_ratio"] == 0.8
    assert (figures["added_latency_p50_ms"], figures["added_latency_p95_ms"]) == (6.0, 6.0)
    assert figures["records_per_s_zero_engine_p1"] == figures["records_per_s_zero_engine_p2"] == 100.0
    assert figures["zero_engine_over_pass_through_p1"] == figures["zero_engine_over_pass_through_p2"] == 0.5
    assert (figures["records_per_s_loop"], figures["records_per_s_run_inference"]) == (250.0, 500.0)
    # One second of each part for 500 records; 4 ms of the 10 ms per record.
    assert figures["cpu_s_per_1000_python_workers_zero_engine_p2"] == 2.0
    assert figures["operator_0_busy_percent_zero_engine_p1"] == 40.0
    operators = {"zero_engine": ["decode", "inference"], "pass_through": ["decode", "inference"]}
    assert report["settings"]["operators"] == {"p1": operators, "p2": operators}
    assert report["rounds"] == len(report["samples"]["pipeline_tokens_per_s"]) == 2
    assert "ratio 0.800" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engine=simulated", "--profile=x.json"], "--engine: this benchmark sets the engines itself"),
        (["--rounds=0"], "--rounds: "),
        (["--requests=1"], "--requests: "),
        (["--records=many"], "--records: "),
        (["--threads=0"], "--threads: "),
        (["--model=/nonexistent/model"], "--model: no config.json in '/nonexistent/model'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str], said: str
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("started")

    monkeypatch.setattr(pipeline, "cluster", never)
    monkeypatch.setattr(pipeline, "bare_engine", never)
    monkeypatch.setattr(sys, "argv", ["pipeline", f"--out={tmp_path / 'x.json'}", *options])
    with pytest.raises(UserError) as refused:
        pipeline.main()
    assert said in str(refused.value)
    assert not (tmp_path / "x.json").exists()

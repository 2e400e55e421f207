"""The batching benchmark without Flink: its figures from given samples, its loads, and its refusals."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from made_job import MadeCpuSeconds, made_cluster, made_running

from benchmarks import batching
from benchmarks.batching import CONTINUOUS, CONTINUOUS_8, MICRO, VARIANTS, BatchingBenchmarkConfig
from core.errors import UserError
from operators.config import Batching

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02d}.5,{80 * (second + 1)},{8 * (second + 1)}\n" for second in range(20)
)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return path


def made_samples() -> dict[str, list[float]]:
    """Two rounds of three paced and of two short requests each."""
    samples = {"paced_requests_per_s": [2.0, 2.0]}
    for variant, tokens, paced in ((CONTINUOUS, 300.0, 10.0), (CONTINUOUS_8, 200.0, 15.0), (MICRO, 100.0, 20.0)):
        samples[f"{variant}_tokens_per_s"] = [tokens, 2 * tokens]
        samples[f"{variant}_requests_per_s"] = [tokens / 10, tokens / 5]
        samples[f"{variant}_paced_ms"] = [paced] * 3 + [2 * paced] * 3
    for variant, beside in ((CONTINUOUS, 60.0), (MICRO, 500.0)):
        samples[f"{variant}_short_ms_without_long"] = [50.0] * 4
        samples[f"{variant}_short_ms_with_long"] = [beside] * 4
    return samples


def test_ratios_are_taken_round_by_round_against_micro_batches() -> None:
    figures = batching.figures_of(made_samples(), rounds=2)
    assert figures["continuous_over_micro8_throughput"] == 3.0
    assert figures["continuous_over_micro8_throughput_8_rows"] == 2.0
    assert figures["continuous_over_micro8_p95"] == 0.5
    assert figures["continuous_over_micro8_p95_8_rows"] == 0.75
    assert figures["short_p95_with_long_over_without"] == 1.2
    assert figures["micro8_short_p95_with_long_over_without"] == 10.0
    assert figures["micro8_paced_p95_ms"] == 30.0


def test_percentiles_are_of_each_round_alone() -> None:
    assert batching.by_round([1.0, 2.0, 3.0, 100.0, 200.0, 300.0], rounds=2, percent=50) == [2.0, 200.0]


def test_the_jobs_differ_in_batching_and_rows_only() -> None:
    jobs = {name: batching.job_of(name, BatchingBenchmarkConfig().engine) for name in VARIANTS}
    assert [jobs[name].engine.max_running for name in (CONTINUOUS, CONTINUOUS_8, MICRO)] == [32, 8, 8]
    assert [jobs[name].batching.batching for name in (CONTINUOUS, MICRO)] == [Batching.CONTINUOUS, Batching.MICRO]
    assert jobs[MICRO].batching.batch_size == 8
    assert all(not job.cache.cache and job.parallelism == 1 for job in jobs.values())
    assert len({job.engine.model_copy(update={"max_running": 1}) for job in jobs.values()}) == 1


def test_the_trace_s_lengths_are_scaled_and_its_gaps_stretched_to_the_rate(trace: Path) -> None:
    config = BatchingBenchmarkConfig(trace=trace, requests=11, prompt_scale=1 / 8, answer_scale=1 / 8)
    load = list(batching.load(config, 0, rate_per_s=2.0))
    assert [len(timed.prompt_token_ids or ()) for timed in load] == [10 * n for n in range(1, 12)]
    assert [timed.max_new_tokens for timed in load] == list(range(1, 12))
    assert [timed.at_ms for timed in load] == pytest.approx([500.0 * n for n in range(11)])


def test_without_a_trace_lengths_are_made_of_its_means() -> None:
    config = BatchingBenchmarkConfig(requests=2000)
    load = list(batching.load(config, 0, rate_per_s=2.0))
    assert sum(len(timed.prompt_token_ids or ()) for timed in load) / 2000 == pytest.approx(1155 / 16, rel=0.1)
    assert sum(timed.max_new_tokens for timed in load) / 2000 == pytest.approx(211 / 4, rel=0.1)


def test_loads_of_one_job_share_no_request() -> None:
    config = BatchingBenchmarkConfig()
    loads = [batching.load(config, seed) for seed in (0, 1, batching.PACED_SEED, batching.WARM_SEED)]
    loads += [batching.short_load(config, batching.SHORT_SEED + round_) for round_ in range(2)]
    loads += [batching.with_long(config, batching.short_load(config, batching.WITH_LONG_SEED), 0)]
    ids = [timed.request_id for load in loads for timed in load]
    assert len(set(ids)) == len(ids)


def test_the_long_request_comes_in_the_midst_of_the_short_ones() -> None:
    config = BatchingBenchmarkConfig()
    work = batching.with_long(config, batching.short_load(config, 0), 0)
    load = list(work)
    assert len(load) == work.requests == config.short_requests + 1
    assert [timed.at_ms for timed in load] == sorted(timed.at_ms for timed in load)
    (at,) = (index for index, timed in enumerate(load) if timed.user_id == "long")
    assert at == config.short_requests // 3
    assert len(load[at].prompt_token_ids or ()) == 1900
    assert [timed for timed in load if timed.user_id != "long"] == list(batching.short_load(config, 0))


def test_a_whole_run_on_made_jobs_writes_a_complete_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, made in (("cluster", made_cluster), ("running", made_running), ("CpuSeconds", MadeCpuSeconds)):
        monkeypatch.setattr(batching, name, made)
    out = tmp_path / "made" / "batching.json"
    monkeypatch.setattr(sys, "argv", ["batching", f"--out={out}", f"--trace={trace}", "--rounds=2", "--requests=10"])
    batching.main()
    report = json.loads(out.read_text())
    figures = report["figures"]
    # All jobs are equal here.
    assert figures["continuous_over_micro8_throughput"] == figures["continuous_over_micro8_p95_8_rows"] == 1.0
    assert figures["short_p95_with_long_over_without"] == 1.0
    assert figures["continuous_requests_per_s"] == 100.0
    assert figures["paced_requests_per_s"] == 60.0
    assert len(report["samples"]["micro8_paced_ms"]) == 20
    # The latency of the long request itself is not included.
    assert len(report["samples"]["continuous_short_ms_with_long"]) == 60
    assert report["settings"]["lengths"] == "trace.csv"
    assert "lengths: trace.csv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engine=simulated", "--profile=x.json"], "--engine: batching is compared on a real engine"),
        (["--trace=/no/such/file"], "--trace: /no/such/file is not a file"),
        (["--long-prompt-tokens=2000"], "--long-prompt-tokens: 2000 and the answer's 64 are more than"),
        (["--paced-share=1"], "--paced-share: "),
        (["--trace={trace}", "--requests=30"], "--requests: the trace has 20 that fit"),
        (["--model=/nonexistent/model"], "--model: no config.json in '/nonexistent/model'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trace: Path, options: list[str], said: str
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("started")

    monkeypatch.setattr(batching, "cluster", never)
    given = [option.format(trace=trace) for option in options]
    monkeypatch.setattr(sys, "argv", ["batching", f"--out={tmp_path / 'x.json'}", *given])
    with pytest.raises(UserError) as refused:
        batching.main()
    assert said in str(refused.value)

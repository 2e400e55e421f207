"""The engine's benchmark with a tiny shape, on a machine that has only PyTorch and transformers."""

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM

from benchmarks import engine as benchmark
from benchmarks.ceilings import ModelCosts, fit
from inference_service.default_model import default_model_path
from inference_service.device_profile import DeviceProfile

ROOT = Path(__file__).parents[2]
NOT_THERE = ("pydantic", "pydantic_core", "rich", "redis", "hiredis", "psutil", "xxhash", "kafka", "pyflink")
ON_A_BARE_MACHINE = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({NOT_THERE!r}))
runpy.run_module("benchmarks.engine", run_name="__main__", alter_sys=True)
"""
LENGTHS, ROWS, CONTEXTS, REUSE = (16, 320), (1, 3), (8, 40), 288
SMALL = ["--lengths", "16,320", "--rows", "1,3", "--contexts", "8,40", "--reuse-tokens", "288", "--chunk-tokens", "16"]
FIELDS = {
    "benchmark",
    "command",
    "started_at",
    "machine",
    "versions",
    "model",
    "rounds",
    "settings",
    "figures",
    "samples",
}
FIGURES = {
    "ceiling_flops_per_s",
    "ceiling_bytes_per_s",
    "decode_over_bandwidth_floor",
    "prefill_over_flops_floor",
    "profile_worst_error_percent",
    "reuse_ms_288",
    "reuse_load_ms_288",
    "reuse_speedup_288",
    *(f"prefill_tokens_per_s_{length}" for length in (*LENGTHS, REUSE)),
    *(f"decode_tokens_per_s_{rows}x{context}" for rows in ROWS for context in CONTEXTS),
    *(f"decode_{rows}x{context}_ms" for rows in ROWS for context in CONTEXTS),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run of two rounds on a bare machine."""
    folder = tmp_path_factory.mktemp("engine")
    shape = ["--shape", "tiny", "--rounds", "2", "--square", "64", "--threads", "1"]
    outputs = ["--out", str(folder / "engine.json"), "--profile-out", str(folder)]
    subprocess.run(
        [sys.executable, "-c", ON_A_BARE_MACHINE, *shape, *SMALL, *outputs],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=240,
    )
    return folder


@pytest.fixture(scope="module")
def report(written: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((written / "engine.json").read_text())
    return read


@pytest.fixture(scope="module")
def profile(written: Path) -> DeviceProfile:
    return DeviceProfile.read(written / "tiny-cpu-float32.json")


def test_the_report_has_the_fields_of_every_benchmark_and_finite_figures(report: dict[str, Any]) -> None:
    assert set(report) == FIELDS
    assert {f"{name}_tiny" for name in FIGURES} <= set(report["figures"])
    assert all(math.isfinite(value) and value >= 0 for value in report["figures"].values())
    assert all(len(values) == 2 for values in report["samples"].values())


def test_the_first_shape_gives_its_headlines_without_its_name(report: dict[str, Any]) -> None:
    for name in benchmark.HEADLINES:
        assert report["figures"][name] == report["figures"][f"{name}_tiny"]


def test_the_ratio_to_the_floor_follows_from_the_samples(report: dict[str, Any], profile: DeviceProfile) -> None:
    samples = report["samples"]
    moved = profile.weight_bytes + profile.kv_bytes_per_token * 9
    kinds = [samples[f"bytes_per_s_{name}_tiny"] for name in ("copy", "read")]
    rates = [max(pair) for pair in zip(*kinds, strict=True)]
    ratios = [ms / 1e3 * rate / moved for ms, rate in zip(samples["decode_1x8_ms_tiny"], rates, strict=True)]
    assert report["figures"]["decode_over_bandwidth_floor"] == pytest.approx(statistics.median(ratios))


def test_the_profile_tells_the_measured_times_again_as_well_as_the_report_says(
    report: dict[str, Any], profile: DeviceProfile
) -> None:
    told = {f"prefill_{length}": profile.prefill_ms(length, 0) for length in (*LENGTHS, REUSE)}
    told |= {f"decode_{rows}x{context}": profile.decode_ms([context] * rows) for rows in ROWS for context in CONTEXTS}
    told["prefill_piece_256_of_288"] = profile.prefill_ms(256, 32)
    told["prefill_last_of_288"] = profile.prefill_ms(1, 287)
    told["decode_3xmixed"] = profile.decode_ms([8, 40, 40])
    measured = {name: statistics.median(report["samples"][f"{name}_ms_tiny"]) for name in told}
    worst = max(abs(told[name] - measured[name]) / measured[name] for name in told)
    assert report["figures"]["profile_worst_error_percent"] == pytest.approx(100 * worst)


def test_the_profile_is_of_the_shape(profile: DeviceProfile) -> None:
    settings = benchmark.SHAPES["tiny"][1]
    assert profile.measured
    assert (profile.layers, profile.kv_heads, profile.head_dim) == (2, 2, 16)
    assert profile.vocab_size == settings["vocab_size"]
    table_bytes = 4 * settings["vocab_size"] * settings["hidden_size"]
    assert 4 * profile.parameters == profile.weight_bytes + table_bytes


@pytest.mark.parametrize(("shape", "parameters"), [("qwen2.5-0.5b", 494_032_768), ("qwen2.5-7b", 7_615_616_512)])
def test_a_shape_has_as_many_parameters_as_the_published_model(shape: str, parameters: int) -> None:
    assert benchmark.shape_bytes(shape, torch.bfloat16) == 2 * parameters


def test_the_default_shape_is_that_of_the_default_model() -> None:
    built = AutoConfig.from_pretrained(default_model_path())
    for name, value in benchmark.SHAPES["default"][1].items():
        assert getattr(built, name) == value, name


def test_flops_are_those_that_the_library_itself_counts() -> None:
    config = Qwen2Config(**benchmark.SHAPES["tiny"][1], attn_implementation="eager")
    costs = benchmark.costs_of(config, torch.float32)
    model = Qwen2ForCausalLM(config).eval()
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(torch.zeros((1, 24), dtype=torch.long), logits_to_keep=1)
    # Eager attention multiplies every pair of tokens, masked or not.
    all_pairs = 24 * costs.flops_per_token + costs.head_flops + costs.attention_flops * 24 * 24
    assert counted.get_total_flops() == all_pairs
    assert costs.prefill(24, 0).flops == all_pairs - costs.attention_flops * (24 * 23 // 2)


def test_a_fit_finds_the_parameters_that_made_the_times() -> None:
    costs = ModelCosts(
        weight_bytes=10**9, kv_bytes_per_token=10**5, flops_per_token=10**9, head_flops=10**8, attention_flops=10**5
    )
    works = [costs.prefill(tokens, 0) for tokens in (1, 128, 512, 2048)]
    works += [costs.decode([context] * rows) for rows in (1, 4, 32) for context in (128, 1024)]
    times = []
    for work in works:
        slower_s = max(work.flops / 2e12, work.weight_bytes / 5e11 + work.kv_bytes / 1e11)
        times.append(1e3 * slower_s + (2.0 + 0.1 * work.decode_rows if work.decode_rows else 3.0))
    found = fit(works, times, 5e11)
    assert found.worst_error_percent < 0.5
    assert found.flops_per_s == pytest.approx(2e12, rel=0.02)
    assert found.bytes_per_s == 5e11
    assert found.kv_bytes_per_s == pytest.approx(1e11, rel=0.1)
    assert found.prefill_overhead_ms == pytest.approx(3.0, rel=0.05)
    assert found.decode_overhead_ms == pytest.approx(2.0, rel=0.05)
    assert found.decode_row_overhead_ms == pytest.approx(0.1, rel=0.1)


def test_no_overhead_of_a_fit_is_below_zero() -> None:
    costs = ModelCosts(
        weight_bytes=10**9, kv_bytes_per_token=10**5, flops_per_token=10**9, head_flops=10**8, attention_flops=10**5
    )
    works = [costs.prefill(512, 0), *(costs.decode([128] * rows) for rows in (1, 4, 32))]
    found = fit(works, [300.0, 4.0, 3.0, 2.5], 1e11)
    assert min(found.prefill_overhead_ms, found.decode_overhead_ms, found.decode_row_overhead_ms) >= 0


def test_a_shape_without_room_is_refused_before_it_is_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "free_bytes", lambda device: 2**30)
    monkeypatch.setattr(sys, "argv", ["engine", "--shape", "qwen2.5-7b"])
    assert refusal(capsys).startswith("error: --shape: qwen2.5-7b needs")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--shape", "huge"], "--shape"),
        (["--reuse-tokens", "100"], "--reuse-tokens"),
        (["--rounds", "0"], "--rounds"),
        (["--lengths", "0,5"], "--lengths"),
        (["--shape", "tiny", "--lengths", "5000"], "--lengths"),
        (["--dtype", "int8"], "--dtype"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["engine", *arguments])
    assert named in refusal(capsys)


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The error line with which the command ends."""
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line

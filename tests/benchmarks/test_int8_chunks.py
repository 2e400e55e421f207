"""The benchmark of int8 chunks end to end on a tiny model, and its measure of drift."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from test_kv_reuse import tiny_model  # noqa: F401 - a fixture

from benchmarks import int8_chunks
from benchmarks.int8_chunks import Int8Probe, drift
from benchmarks.reuse_probe import WrongMeasurementError
from core.errors import UserError

OPTIONS = ["--prompts=2", "--prompt-tokens=128", "--positions=5", "--device=cpu"]


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["int8_chunks", *options])
    int8_chunks.main()


def test_the_result_is_complete(
    tiny_model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "int8_chunks.json"
    run(monkeypatch, *OPTIONS, f"--model={tiny_model}", f"--out={out}", f"--threads={torch.get_num_threads()}")
    report = json.loads(out.read_text())
    figures, samples = report["figures"], report["samples"]
    assert all(math.isfinite(value) for value in figures.values())
    # Two layers, key and value, 2 heads of 16 numbers, 32 tokens; a header, and scales of channels and of tokens.
    assert figures["record_bytes_raw"] == 2 * 2 * 2 * 32 * 16 * 4 + 128
    assert figures["record_bytes_int8"] == 2 * 2 * 2 * 32 * 16 + 2 * 2 * (16 + 32) * 4 + 128
    assert figures["same_best_percent_raw"] == 100
    assert figures["max_drift_raw"] < 1e-4 < figures["max_drift_int8"]
    assert figures["max_drift_int8"] == max(samples["max_drift_int8"])
    assert 0 < figures["kl_mean_chained"] <= figures["kl_max_chained"]
    assert len(samples["kl_int8"]) == 2 * 5
    assert len(samples["fetch_ms_raw"]) == len(samples["encode_mb_per_s_int8"]) == 2
    assert report["settings"]["weights"] == "the model's"
    assert "of the bytes" in capsys.readouterr().out


def test_a_prompt_that_redis_does_not_hold_ends_the_run(
    tiny_model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetch = Int8Probe._fetch
    monkeypatch.setattr(Int8Probe, "_fetch", lambda probe, codec, prompt: fetch(probe, codec, prompt[::-1]))
    with pytest.raises(WrongMeasurementError, match="0 of 4 chunks"):
        run(monkeypatch, *OPTIONS, f"--model={tiny_model}", f"--out={tmp_path / 'x.json'}")
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("tokens", [100, 96])
def test_prompts_must_be_full_chunks_and_enough_of_them(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    with pytest.raises(UserError, match=f"--prompt-tokens: {tokens} is not a multiple of the 32 tokens"):
        run(monkeypatch, f"--prompt-tokens={tokens}")


def test_a_drift_by_hand() -> None:
    exact = torch.tensor([1.0, 0.0, -1.0])  # of a standard deviation of 1
    assert drift(exact, exact) == {"max_drift": 0, "mean_drift": 0, "kl": 0, "same_best": 1}
    found = drift(exact, torch.tensor([0.0, 0.5, -1.0]))
    assert (found["max_drift"], found["mean_drift"], found["same_best"]) == (1.0, 0.5, 0.0)
    p = [math.exp(x) / sum(map(math.exp, (1, 0, -1))) for x in (1, 0, -1)]
    q = [math.exp(x) / sum(map(math.exp, (0, 0.5, -1))) for x in (0, 0.5, -1)]
    assert found["kl"] == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))

"""The benchmark of reuse end to end on a tiny model: its report, and its refusal of wrong measurements."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import kv_reuse
from benchmarks.report import median_noise, spread
from benchmarks.reuse_probe import ReuseProbe, WrongMeasurementError
from core.errors import UserError
from inference_service.byte_tokenizer import byte_tokenizer
from inference_service.completion import Completion

PROMPTS = (64, 128)
FIGURES = {
    *(f"{kind}_{length}" for length in PROMPTS for kind in ("local_speedup", "redis_speedup", "redis_over_floor")),
    *(f"recompute_over_unbroken_{length}" for length in PROMPTS),
    *(f"{kind}_ttft_ms_{length}" for length in PROMPTS for kind in ("recompute", "local", "redis")),
    *(f"{kind}_{length}" for length in PROMPTS for kind in ("redis_floor_ms", "moved_bytes")),
    *("no_reuse_overhead_percent", "no_reuse_overhead_noise_percent", "no_reuse_on_ms", "no_reuse_off_ms"),
    "neighbours_busy_percent",
}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["kv_reuse", *options])
    kv_reuse.main()


def quick(model: Path, out: Path) -> list[str]:
    sizes = ["--rounds=2", "--pairs=1", "--prompts=64,128", "--unique-prompt-tokens=64", "--unique-output-tokens=33"]
    return [*sizes, f"--model={model}", f"--out={out}", "--device=cpu", f"--threads={torch.get_num_threads()}"]


def test_the_result_is_complete(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "kv_reuse.json"
    run(monkeypatch, *quick(tiny_model, out))
    report = json.loads(out.read_text())
    figures = report["figures"]
    assert set(figures) >= FIGURES
    assert all(math.isfinite(value) for value in figures.values())
    assert all(figures[name] > 0 for name in FIGURES if "percent" not in name)
    # Two layers, key and value, 2 heads of 16 floats, and a header for each chunk of 32 tokens.
    assert figures["moved_bytes_128"] == 4 * (2 * 2 * 2 * 32 * 16 * 4 + 128)
    assert report["rounds"] == 2
    assert all(len(values) == (1 if name.startswith("unique") else 2) for name, values in report["samples"].items())
    assert report["command"].startswith("python ")
    assert report["model"]["dtype"] == "float32"
    assert {"python", "torch", "transformers", "redis-server", "redis-py", "git_commit"} <= set(report["versions"])
    assert {"processor", "cores", "memory_bytes", "threads", "device"} <= set(report["machine"])
    assert report["settings"]["cache"]["remote"]["remote_deadline_ms"] > 0
    assert "recompute" in capsys.readouterr().out


def test_a_prompt_served_otherwise_ends_the_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine gets another prompt, which Redis does not have, so all of it is computed."""
    out = tmp_path / "kv_reuse.json"
    complete = ReuseProbe._complete

    def swapped(probe: ReuseProbe, engine: object, prompt: list[int], max_new_tokens: int) -> Completion:
        other = prompt[::-1] if engine is probe._remote else prompt
        return complete(probe, engine, other, max_new_tokens)  # type: ignore[arg-type]

    monkeypatch.setattr(ReuseProbe, "_complete", swapped)
    with pytest.raises(WrongMeasurementError, match="remote"):
        run(monkeypatch, *quick(tiny_model, out))
    assert not out.exists()


def test_prompts_must_be_full_chunks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--prompts: 100 is not a multiple of the 32 tokens"):
        run(monkeypatch, "--prompts=64,100", f"--out={tmp_path / 'x.json'}")


def test_spread_and_noise() -> None:
    assert spread("x", [3.0, 1.0, 2.0, 5.0, 4.0]) == {"x": 3.0, "x_p25": 2.0, "x_p75": 4.0}
    assert spread("x", [7.0]) == {"x": 7.0, "x_p25": 7.0, "x_p75": 7.0}
    assert median_noise([4.0] * 9) == 0
    assert 0 < median_noise([1.0, 2.0, 3.0, 4.0, 5.0]) <= 2

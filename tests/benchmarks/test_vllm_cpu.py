"""The comparison with vLLM, with a stand-in for vLLM: figures, models in turn, differences."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from benchmarks import vllm_cpu
from benchmarks.baselines import vllm_process
from benchmarks.reuse_probe import WrongMeasurementError
from benchmarks.vllm_cpu import OurEngine, PromptBatch
from core.errors import UserError
from inference_service.config import EngineConfig
from inference_service.transformers_engine import load_checked_model
from tests.inference_service.engine_helpers import LAYERS_OF_TWO, save_tiny

LOADS = (PromptBatch("decode1", 1, 4, 3), PromptBatch("prefill1024", 1, 20, 1), PromptBatch("mix", 3, 5, 2))


class Stand:
    """A second engine of ours in place of vLLM."""

    wrong = False

    def __init__(self, model: Path, max_len: int, rows: int, cores: Sequence[int]) -> None:
        config = EngineConfig(model=str(model), device="cpu", max_running=rows, max_model_len=max_len)
        self._engine = OurEngine(load_checked_model(config), config)

    def __enter__(self) -> "Stand":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ready(self) -> dict[str, Any]:
        return {"vllm": "0", "torch": "0", "threads": 1}

    def answer(self, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, list[list[int]]]:
        took_s, answers = self._engine.answer(prompts, tokens)
        return took_s, [[-1] for _ in answers] if self.wrong else answers


@pytest.fixture(autouse=True)
def tiny(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tiny(tmp_path_factory.mktemp("tiny"), transformers.Qwen2Config(**LAYERS_OF_TWO))
    monkeypatch.setattr(vllm_cpu, "VllmProcess", Stand)
    monkeypatch.setattr(vllm_cpu, "default_model_path", lambda: path)
    monkeypatch.setattr(vllm_cpu, "large_model_path", lambda: path)
    monkeypatch.setattr(vllm_cpu, "LOADS", LOADS)
    monkeypatch.setattr(vllm_cpu, "MAX_LEN", 64)


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> dict[str, Any]:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["vllm_cpu", f"--out={out}", "--rounds=2", "--threads=1", *options])
    try:
        vllm_cpu.main()
    finally:
        torch.set_num_threads(threads)
    report: dict[str, Any] = json.loads(out.read_text())
    return report


def test_one_model_at_a_time_gives_the_figures_of_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "vllm_cpu.json"
    first = run(monkeypatch, out, "--models=large")
    assert set(first["model"]) == {"large"}
    both = run(monkeypatch, out, "--models=default")
    assert set(both["model"]) == {"default", "large"}
    names = {f"{prefix}ours_over_vllm_{load.name}" for prefix in ("", "large_") for load in LOADS}
    assert names <= set(both["figures"])
    assert all(both["figures"][name] == value for name, value in first["figures"].items())
    assert both["figures"]["equal_answers"] == 1
    assert {len(values) for values in both["samples"].values()} == {2}
    # A ratio of throughputs above 1 means that ours is faster.
    ours, vllm = (both["samples"][f"{side}_decode1_s"] for side in ("ours", "vllm"))
    ratio = both["figures"]["ours_over_vllm_decode1"]
    assert ratio == pytest.approx(sum(theirs / own for theirs, own in zip(vllm, ours, strict=True)) / 2, rel=1e-2)


def test_answers_that_differ_end_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Stand, "wrong", True)
    with pytest.raises(WrongMeasurementError, match=r"only 0\.00 of the answers are equal"):
        run(monkeypatch, tmp_path / "vllm_cpu.json", "--models=default")


def test_a_model_of_no_such_name_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--models: 'huge' is not one of default, large"):
        run(monkeypatch, tmp_path / "vllm_cpu.json", "--models=huge")


def test_a_process_that_ends_is_told_with_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vllm_process, "HOME", tmp_path)
    monkeypatch.setattr(vllm_process, "LOG", tmp_path / "vllm.log")
    # An interpreter without vLLM.
    monkeypatch.setattr(vllm_process, "vllm_python", lambda: Path(sys.executable))
    with (
        vllm_process.VllmProcess(tmp_path, 64, 2, [0]) as process,
        pytest.raises(UserError, match=r"vLLM has ended with status 1; its output is in .*vllm\.log"),
    ):
        process.ready()
    assert "No module named 'vllm'" in (tmp_path / "vllm.log").read_text()

"""The default model: it is built once, equal seeds give equal models, and its tokenizer is lossless."""

import hashlib
import multiprocessing
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import EOS_ID, LAYERS_OF_TWO, PAD_ID, load_tiny, save_tiny
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2Config

from inference_service import default_model
from inference_service.byte_tokenizer import EOS, PAD, byte_tokenizer
from inference_service.config import EngineConfig
from inference_service.default_model import NAME, build_default_model, default_model_path
from inference_service.model import LoadedModel
from inference_service.transformers_engine import load_checked_model


def digest(path: Path) -> str:
    return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def built(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INFERTUNER_HOME", str(home))
    return default_model_path()


def test_it_is_built_once(built: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert built == home / "models" / NAME

    def never(*_: Any) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(default_model, "build_default_model", never)
    assert default_model_path() == built
    assert [path.name for path in built.parent.iterdir()] == [NAME]


def test_the_seed_decides_the_weights(built: Path, tmp_path: Path) -> None:
    build_default_model(tmp_path / "same")
    assert digest(tmp_path / "same") == digest(built)
    build_default_model(tmp_path / "other", seed=1)
    assert digest(tmp_path / "other") != digest(built)


def test_it_loads_and_runs_over_the_pool(built: Path) -> None:
    model = load_checked_model(EngineConfig(device="cpu"))
    assert model.name == NAME
    assert 28e6 < sum(weight.numel() for weight in model.model.parameters()) < 34e6
    assert (model.vocab_size, model.max_len, model.eos_token_ids) == (258, 2048, {EOS_ID})


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The tokenizer as a job uses it: saved and loaded with a model of the default architecture."""
    return load_tiny(save_tiny(tmp_path_factory.mktemp("tokenizer") / "m", Qwen2Config(**LAYERS_OF_TWO)))


@given(text=st.text().filter(lambda text: EOS not in text and PAD not in text))
def test_any_text_comes_back(loaded: LoadedModel, text: str) -> None:
    tokens = loaded.tokenizer(text)["input_ids"]
    assert len(tokens) == len(text.encode())
    assert max(tokens, default=0) < 256
    assert loaded.tokenizer.decode(tokens, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    "text",
    ["👩‍👩‍👧‍👦 🇨🇭", "e\u0301 ≠ é", " a , b . don 't ", "\r\n\t\x00", "<|endoftext|>", "\u0131\u017f\ufb01\u212a"],
)
def test_odd_text_comes_back(loaded: LoadedModel, text: str) -> None:
    assert loaded.tokenizer.decode(loaded.tokenizer(text)["input_ids"]) == text


def test_the_end_is_one_token_and_no_text(loaded: LoadedModel) -> None:
    assert loaded.tokenizer("a<|end|><|pad|>")["input_ids"][1:] == [EOS_ID, PAD_ID]
    assert loaded.tokenizer.decode([EOS_ID, PAD_ID], skip_special_tokens=True) == ""
    assert (loaded.tokenizer.eos_token_id, loaded.tokenizer.pad_token_id) == (EOS_ID, PAD_ID)
    assert loaded.tokenizer.backend_tokenizer.to_str() == byte_tokenizer().backend_tokenizer.to_str()


def build_when_all_have_built(barrier: Barrier) -> None:
    """Build in a separate process, which reaches the rename at the same time as the others."""

    def small(path: Path, seed: int = 0) -> None:
        save_tiny(path, Qwen2Config(**LAYERS_OF_TWO))
        barrier.wait(60)

    default_model.build_default_model = small
    assert (default_model_path() / "model.safetensors").exists()


def test_processes_that_build_at_once_end_up_with_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERTUNER_HOME", str(tmp_path))
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    builders = [context.Process(target=build_when_all_have_built, args=(barrier,)) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)
    assert [builder.exitcode for builder in builders] == [0, 0]
    assert [path.name for path in (tmp_path / "models").iterdir()] == [NAME]
    assert load_tiny(tmp_path / "models" / NAME).vocab_size == 258

"""Loading by path or name, its refusals, and the identity of what was loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from engine_helpers import EOS_ID, LAYERS_OF_TWO, load_tiny, save_tiny
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen2Config

from core.config import EngineConfig
from core.errors import UserError
from inference_service.model import load_model, resolve_device, resolve_model


def refusal(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        load_model(EngineConfig(model=str(path), device="cpu"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def saved(tiny_paths: dict[str, Path], tmp_path: Path) -> Path:
    """A saved model that the test may damage."""
    return Path(shutil.copytree(tiny_paths["qwen2"], tmp_path / "copy"))


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere").startswith("--model: no config.json in ")
    assert refusal(tmp_path).startswith("--model: no config.json in ")


def test_a_path_without_weights_is_refused(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    assert refusal(saved).startswith("model: cannot load ")


def test_incomplete_weights_are_refused_and_not_made_up(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    assert refusal(saved) == (
        "model: the weights of 'copy' are incomplete: model.layers.1.self_attn.k_proj.weight missing; "
        "save the model again"
    )


@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_damaged_weights_are_refused(saved: Path, damage: str) -> None:
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"\xff" * 100)
    assert refusal(saved).startswith("model: cannot load ")


def test_weights_of_another_shape_are_refused(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    assert refusal(saved).startswith("model: cannot load ")


@pytest.mark.parametrize("content", ["{", '{"model_type": "no-such-architecture"}', "{}"])
def test_a_bad_configuration_is_refused(saved: Path, content: str) -> None:
    (saved / "config.json").write_text(content)
    assert refusal(saved).startswith("model: cannot load ")


def test_without_a_tokenizer_it_is_refused(saved: Path) -> None:
    for path in saved.glob("tokenizer*"):
        path.unlink()
    assert refusal(saved) == f"model: there is no tokenizer in {str(saved)!r}; save one beside the weights"


def test_names_and_paths_are_told_apart(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(saved)) == (str(saved.resolve()), "copy")
    monkeypatch.chdir(saved.parent)
    assert resolve_model("copy") == (str(saved.resolve()), "copy")
    assert resolve_model("./copy")[1] == "copy"
    assert resolve_model("Qwen/Qwen2-0.5B") == ("Qwen/Qwen2-0.5B", "Qwen/Qwen2-0.5B")
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve_model("a/b/c")


def test_the_row_is_as_long_as_the_model_allows(saved: Path) -> None:
    assert load_tiny(saved, max_model_len=40).max_len == 40
    assert load_tiny(saved, max_model_len=10_000).max_len == 256


def test_end_tokens_come_from_the_generation_configuration(saved: Path) -> None:
    assert load_tiny(saved).eos_token_ids == {EOS_ID}
    settings = json.loads((saved / "generation_config.json").read_text())
    for value, found in (([1, 2], {1, 2}), (3, {3}), (None, set())):
        (saved / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": value}))
        if value is None:
            config = json.loads((saved / "config.json").read_text())
            (saved / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
        assert load_tiny(saved).eos_token_ids == found


def test_the_chunk_shape_is_that_of_the_attention(tiny_paths: dict[str, Path]) -> None:
    shape = load_tiny(tiny_paths["qwen2"]).chunk_shape(8)
    assert shape.size == (2, 2, 2, 8, 16)
    assert load_tiny(tiny_paths["gpt2"]).chunk_shape(8).size == (2, 2, 4, 8, 16)
    assert shape.size_bytes == 2 * 2 * 2 * 8 * 16 * 4


# Identity.


def test_equal_content_has_one_identity_wherever_it_lies(saved: Path, tiny_paths: dict[str, Path]) -> None:
    assert load_tiny(saved).identity == load_tiny(tiny_paths["qwen2"]).identity


def test_other_weights_have_another_identity(saved: Path) -> None:
    before = load_tiny(saved).identity
    weights = load_file(saved / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    after = load_tiny(saved).identity
    assert after.weights_digest != before.weights_digest
    assert (after.tokenizer_digest, after.settings) == (before.tokenizer_digest, before.settings)


def test_another_dtype_is_another_identity(saved: Path) -> None:
    digests = {
        load_model(EngineConfig(model=str(saved), device="cpu", dtype=dtype)).identity.weights_digest
        for dtype in ("float32", "bfloat16", "float16")
    }
    assert len(digests) == 3


def test_other_positions_are_another_identity(tmp_path: Path) -> None:
    found = set()
    for theta in (10_000.0, 1_000_000.0):
        config = LlamaConfig(**LAYERS_OF_TWO, rope_parameters={"rope_type": "default", "rope_theta": theta})
        found.add(load_tiny(save_tiny(tmp_path / str(theta), config)).identity)
    assert len({one.settings for one in found}) == 2
    assert len({one.weights_digest for one in found}) == 1


def test_another_tokenizer_is_another_identity(saved: Path) -> None:
    before = load_tiny(saved).identity
    content = json.loads((saved / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}
    (saved / "tokenizer.json").write_text(json.dumps(content))
    after = load_tiny(saved).identity
    assert after.tokenizer_digest != before.tokenizer_digest
    assert after.weights_digest == before.weights_digest


def test_a_tokenizer_is_loaded_as_it_was_saved(saved: Path) -> None:
    """Qwen2's own would normalise text and add tokens that the model has no embedding for."""
    tokenizer = load_tiny(saved).tokenizer
    assert len(tokenizer) == Qwen2Config(**LAYERS_OF_TWO).vocab_size
    assert tokenizer.backend_tokenizer.normalizer is None
    assert max(tokenizer("<|endoftext|>")["input_ids"]) < 256


# Devices.


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_without_a_gpu_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    assert resolve_device("auto", 3) == resolve_device("cpu", 0) == torch.device("cpu")
    for asked in ("cuda", "cuda:1"):
        with pytest.raises(UserError, match=f"^device: '{asked}' asks for a GPU and there is none; use cpu or auto$"):
            resolve_device(asked, 0)


def test_gpus_go_round_among_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 2)
    for asked in ("auto", "cuda"):
        assert [resolve_device(asked, slot).index for slot in range(5)] == [0, 1, 0, 1, 0]
    assert resolve_device("cuda:1", 4) == torch.device("cuda", 1)
    assert resolve_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(UserError, match=r"^device: there is no 'cuda:2' among 2 GPUs$"):
        resolve_device("cuda:2", 0)

"""Loading by path or name, refusals, and the fingerprint of the loaded model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from engine_helpers import EOS_ID, LAYERS_OF_TWO, load_tiny, save_tiny
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, Qwen2Config

from core.errors import UserError
from inference_service.config import EngineConfig
from inference_service.model import load_model, resolve_device, resolve_model


def refusal(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        load_model(EngineConfig(model=str(path), device="cpu"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(file: Path, **settings: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


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


def test_weights_that_the_configuration_has_no_place_for_are_refused(saved: Path) -> None:
    rewrite(saved / "config.json", num_hidden_layers=1, layer_types=["full_attention"])
    line = refusal(saved)
    assert line.startswith("model: the weights of 'copy' hold model.layers.1.input_layernorm.weight, ")
    assert line.endswith(" and 9 more, which its config.json has no place for; mend that, or save the model again")


def test_buffers_of_older_versions_are_no_weights_left_over(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    assert load_tiny(saved).max_len > 0


def test_an_adapter_beside_the_weights_is_refused(saved: Path) -> None:
    (saved / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "base"}))
    assert refusal(saved) == (
        "model: beside the weights of 'copy' is an adapter (adapter_config.json), which would not be used; merge it "
        "into the weights and save those, or move it away"
    )


def test_code_of_a_models_own_is_refused_without_a_question(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(saved / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    assert refusal(saved) == (
        f"model: cannot load {str(saved)!r}: it has Python code of its own (auto_map), which is not run; choose a "
        "model that transformers has"
    )
    assert capsys.readouterr().out == ""


def test_being_offline_is_named_where_it_matters(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("not\nfound")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    assert refusal(saved) == f"model: cannot load {str(saved)!r}: not found"
    assert refusal("some/model") == "model: cannot load 'some/model' (HF_HUB_OFFLINE is set): not found"


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


def test_a_sequence_that_is_cut_to_the_models_own_limit_is_told_of(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert (load_tiny(saved, max_model_len=40).own_limit, caplog.messages) == (None, [])
    assert (load_tiny(saved, max_model_len=256).own_limit, caplog.messages) == ("max_position_embeddings", [])
    assert load_tiny(saved, max_model_len=300).own_limit == "max_position_embeddings"
    assert caplog.messages == ["--max-model-len 300 is cut to 256 for 'copy': its own limit (max_position_embeddings)"]


def test_the_reach_of_yarn_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    config = Qwen2Config(**LAYERS_OF_TWO | {"max_position_embeddings": 64, "rope_parameters": yarn})
    model = load_tiny(save_tiny(tmp_path / "yarn", config), max_model_len=256)
    limit = "max_position_embeddings, which its config.json may raise to the 256 of its YaRN"
    assert (model.max_len, model.own_limit) == (64, limit)
    assert caplog.messages == [f"--max-model-len 256 is cut to 64 for 'yarn': its own limit ({limit})"]


def test_end_tokens_are_those_of_all_that_name_some(saved: Path) -> None:
    assert load_tiny(saved).eos_token_ids == {EOS_ID}
    rewrite(saved / "generation_config.json", eos_token_id=[1, 2])
    rewrite(saved / "config.json", eos_token_id=3)
    assert load_tiny(saved).eos_token_ids == {1, 2, 3, EOS_ID}
    # Often only the tokenizer knows the end-of-turn token.
    rewrite(saved / "generation_config.json", eos_token_id=None)
    rewrite(saved / "config.json", eos_token_id=None)
    assert load_tiny(saved).eos_token_ids == {EOS_ID}
    rewrite(saved / "tokenizer_config.json", eos_token=None)
    assert load_tiny(saved).eos_token_ids == set()


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
    """Qwen2's own tokenizer would normalise text and add tokens without an embedding."""
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

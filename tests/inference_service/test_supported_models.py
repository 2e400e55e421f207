"""Which models are refused at load, and with which line; accepted models answer as the model alone."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from engine_helpers import (
    CHUNK,
    GPT2,
    LAYERS_OF_TWO,
    MAX_LEN,
    MemoryCache,
    answers,
    ask,
    load_tiny,
    make_engine,
    plain_answer,
    save_tiny,
    tokens_of,
)

from core.errors import UserError
from inference_service import support
from inference_service.attention_window import AttentionWindow
from inference_service.kv_pool import KVPool
from inference_service.model import LoadedModel
from inference_service.runner import Runner
from inference_service.support import check_logits

LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}
LINEAR = {
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "layer_types": ["linear_attention", "full_attention"],
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
}


def tiny(config: type[Any], **fields: Any) -> Any:
    return config(**{**LAYERS_OF_TWO, **fields})


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "mamba": (
        lambda: hf.MambaConfig(vocab_size=258, hidden_size=32, num_hidden_layers=2, state_size=4),
        "layer 0 is 'linear_attention'",
    ),
    "rwkv": (
        lambda: hf.RwkvConfig(vocab_size=258, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
        "it does not run over the pool",
    ),
    "qwen3-next": (lambda: tiny(hf.Qwen3NextConfig, **LINEAR), "layer 0 is 'linear_attention'"),
    "deepseek-v2": (lambda: tiny(hf.DeepseekV2Config, q_lora_rank=None, **LATENT), "latent attention (kv_lora_rank)"),
    "deepseek-v3": (lambda: tiny(hf.DeepseekV3Config, q_lora_rank=16, **LATENT), "latent attention (kv_lora_rank)"),
    "t5": (
        lambda: hf.T5Config(vocab_size=258, d_model=32, num_layers=1, num_heads=4, d_ff=32, d_kv=8),
        "is an encoder-decoder",
    ),
    "bart": (
        lambda: hf.BartConfig(
            vocab_size=258,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            pad_token_id=257,
            bos_token_id=0,
            eos_token_id=256,
            decoder_start_token_id=256,
            forced_eos_token_id=256,
        ),
        "is an encoder-decoder",
    ),
    "gpt2 with cross attention": (
        lambda: hf.GPT2Config(**GPT2, add_cross_attention=True),
        "cross attention (add_cross_attention)",
    ),
    # The usual width of fresh weights, where attention only changes the fourth digit.
    "bert, which sees what follows": (
        lambda: hf.BertConfig(
            vocab_size=258, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        ),
        "its logits at position 35 differ by",
    ),
    "phi3 with angles that depend on the length": (
        lambda: tiny(
            hf.Phi3Config,
            original_max_position_embeddings=48,
            rope_parameters={**LONGROPE, "original_max_position_embeddings": 48},
        ),
        "rope_type longrope) change for sequences above 48 tokens, less than the 64 that a row holds; "
        "set --max-model-len to at most 48",
    ),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_a_model_that_would_run_wrong_is_refused(make: Callable[[], Any], reason: str, tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "odd", make())
    with pytest.raises(UserError) as caught:
        load_tiny(path)
    line = str(caught.value)
    assert line.startswith("model: 'odd'")
    assert reason in line
    assert "\n" not in line


RIGHT_OR_REFUSED: dict[str, tuple[Callable[[], Any], bool]] = {
    "qwen3 with heads of another size": (lambda: tiny(hf.Qwen3Config, head_dim=32), True),
    "phi3": (
        lambda: tiny(
            hf.Phi3Config,
            original_max_position_embeddings=MAX_LEN,
            rope_parameters={**LONGROPE, "original_max_position_embeddings": MAX_LEN},
        ),
        True,
    ),
    "bloom": (
        lambda: hf.BloomConfig(
            vocab_size=258, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.2, eos_token_id=256
        ),
        False,
    ),
    "mpt": (lambda: hf.MptConfig(vocab_size=258, d_model=64, n_heads=4, n_layers=2, max_seq_len=256), False),
    "opt": (
        lambda: hf.OPTConfig(
            vocab_size=258,
            hidden_size=64,
            word_embed_proj_dim=64,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            init_std=0.2,
            eos_token_id=256,
            bos_token_id=None,
        ),
        False,
    ),
}


@pytest.mark.parametrize(("make", "must_run"), RIGHT_OR_REFUSED.values(), ids=RIGHT_OR_REFUSED.keys())
def test_a_model_is_right_or_refused(make: Callable[[], Any], must_run: bool, tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "odd", make())
    try:
        model = load_tiny(path)
    except UserError:
        assert not must_run
        return
    engine = make_engine(model, cache=MemoryCache(model.chunk_shape(CHUNK)), max_running=3)
    prompts = {f"p{length}": tokens_of(length, length) for length in (1, 9, 24, 41, 55)}
    for _ in range(2):
        done = answers(engine.run([ask(name, prompt) for name, prompt in prompts.items()]))
        assert {name: one.token_ids for name, one in done.items()} == {
            name: plain_answer(model, prompt, 6) for name, prompt in prompts.items()
        }
    assert done["p55"].local_tokens == 48


@pytest.mark.parametrize("max_model_len", [2, 3, 4, 5, 41, 256])
def test_any_length_of_rows_passes_the_self_test(tiny_paths: dict[str, Path], max_model_len: int) -> None:
    assert load_tiny(tiny_paths["qwen2"], max_model_len=max_model_len).max_len == max_model_len


# The self-test against pools, runners and models that are wrong in one thing.


class ShiftedLoad(KVPool):
    def load_chunk(self, row: int, index: int, chunk: torch.Tensor) -> None:
        super().load_chunk(row, index, chunk.roll(1, dims=3))
        self._memory[:, :, row, :, 0] = 0


class SwappedLoad(KVPool):
    def load_chunk(self, row: int, index: int, chunk: torch.Tensor) -> None:
        super().load_chunk(row, index, chunk.flip(1))


class ForgottenLoad(KVPool):
    def load_chunk(self, row: int, index: int, chunk: torch.Tensor) -> None:
        pass


class OneRowForAll(KVPool):
    def write_rows(self, layer: int, positions: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        super().write_rows(layer, positions, key[:1].expand_as(key), value[:1].expand_as(value))


class DecodeOnePlaceOff(KVPool):
    def write_rows(self, layer: int, positions: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        super().write_rows(layer, positions - 1, key, value)


class PieceOnePlaceOff(KVPool):
    def write(self, layer: int, row: int, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        super().write(layer, row, max(0, start - 1), key, value)


class NaNPool(KVPool):
    def load_chunk(self, row: int, index: int, chunk: torch.Tensor) -> None:
        super().load_chunk(row, index, chunk * float("nan"))


@pytest.mark.parametrize(
    "pool",
    [ShiftedLoad, SwappedLoad, ForgottenLoad, OneRowForAll, DecodeOnePlaceOff, PieceOnePlaceOff, NaNPool],
    ids=lambda c: c.__name__,
)
@pytest.mark.parametrize("packs", [True, False], ids=["packed", "one by one"])
def test_the_self_test_finds_a_wrong_pool(
    model: LoadedModel, pool: type[KVPool], packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "KVPool", pool)
    with pytest.raises(UserError, match="between the pool and the model alone"):
        check_logits(dataclasses.replace(model, packs=packs))


Masks = dict[AttentionWindow, torch.Tensor]


class MaskChanged(Runner):
    """A model whose boolean mask `change` makes wrong."""

    change: Callable[[torch.Tensor], torch.Tensor]

    def _forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, masks: Masks, logit_rows: int = 1
    ) -> torch.Tensor:
        wrong = {window: type(self).change(mask) for window, mask in masks.items()}
        return super()._forward(input_ids, position_ids, wrong, logit_rows)


class SeesWhatFollows(MaskChanged):
    change = staticmethod(torch.ones_like)


class BlindToTheFirst(MaskChanged):
    @staticmethod
    def change(mask: torch.Tensor) -> torch.Tensor:
        mask = mask.clone()
        mask[..., 0] &= mask.shape[-1] == 1
        return mask


class PositionsOff(Runner):
    def _forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, masks: Masks, logit_rows: int = 1
    ) -> torch.Tensor:
        return super()._forward(input_ids, position_ids * 2, masks, logit_rows)


@pytest.mark.parametrize("runner", [SeesWhatFollows, BlindToTheFirst, PositionsOff], ids=lambda c: c.__name__)
def test_the_self_test_finds_a_wrong_runner(
    model: LoadedModel, runner: type[Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "Runner", runner)
    with pytest.raises(UserError, match="between the pool and the model alone"):
        check_logits(dataclasses.replace(model, packs=False))


class IgnoresPositions:
    """A model that counts positions itself, along the longest row."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, position_ids: torch.Tensor | None = None, **arguments: Any) -> Any:
        return self._model(**arguments)


class RaisesOverThePool(IgnoresPositions):
    def __call__(self, past_key_values: Any = None, **arguments: Any) -> Any:
        if past_key_values is not None:
            raise IndexError("no such\nlayer")
        return self._model(**arguments)


def test_the_self_test_finds_a_model_that_ignores_positions(model: LoadedModel) -> None:
    # A table of learned positions ends before a packed pass does, if they are counted through it.
    with pytest.raises(UserError, match=r"between the pool and the model alone|IndexError: index out of range"):
        check_logits(dataclasses.replace(model, model=IgnoresPositions(model.model)))


def test_a_model_that_raises_over_the_pool_is_refused_in_one_line(qwen2: LoadedModel) -> None:
    with pytest.raises(UserError, match="it does not run over the pool: IndexError: no such layer"):
        check_logits(dataclasses.replace(qwen2, model=RaisesOverThePool(qwen2.model)))

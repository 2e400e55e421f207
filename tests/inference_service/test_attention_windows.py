"""Models whose layers attend to a window or a chunk: exact in any pass, or refused."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from engine_helpers import (
    CHUNK,
    EOS_ID,
    LAYERS_OF_TWO,
    MAX_LEN,
    MemoryCache,
    answers,
    ask,
    load_tiny,
    make_engine,
    save_tiny,
    tokens_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import chunked_causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from core.errors import UserError
from inference_service import attention_window, support
from inference_service.attention_window import FULL, AttentionWindow
from inference_service.model import LoadedModel
from inference_service.model import _settings as settings_of
from inference_service.support import check_logits

WINDOW = 12
SLIDING, CHUNKED = AttentionWindow(WINDOW), AttentionWindow(WINDOW, chunked=True)
EVERY_LAYER = {"use_sliding_window": True, "max_window_layers": 0}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
NEO: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": EOS_ID,
    "bos_token_id": None,
}


def tiny(config: type[Any], **fields: Any) -> Any:
    # With tied embeddings a random model often repeats its last token for ever.
    return config(**{**LAYERS_OF_TWO, "sliding_window": WINDOW, "tie_word_embeddings": False, **fields})


def mixed(config: type[Any], **fields: Any) -> Any:
    """One layer with the window, and one without."""
    return tiny(config, layer_types=["sliding_attention", "full_attention"], **fields)


def llama4(**fields: Any) -> Any:
    """One layer with attention chunks, and one without."""
    layer_types = ["chunked_attention", "full_attention"]
    own = {"head_dim": 16, "attention_chunk_size": WINDOW, "intermediate_size_mlp": 64, "layer_types": layer_types}
    return tiny(hf.Llama4TextConfig, **own, **EXPERTS, **fields)


MODELS: dict[str, tuple[Callable[[], Any], tuple[AttentionWindow, ...]]] = {
    "mistral": (lambda: tiny(hf.MistralConfig), (SLIDING, SLIDING)),
    "mixtral": (lambda: tiny(hf.MixtralConfig, **EXPERTS), (SLIDING, SLIDING)),
    "phi3": (lambda: tiny(hf.Phi3Config), (SLIDING, SLIDING)),
    "starcoder2": (lambda: tiny(hf.Starcoder2Config), (SLIDING, SLIDING)),
    "qwen2, window on": (lambda: tiny(hf.Qwen2Config, **EVERY_LAYER), (SLIDING, SLIDING)),
    "qwen2, window off": (lambda: tiny(hf.Qwen2Config, use_sliding_window=False), (FULL, FULL)),
    "gemma2, capped scores": (
        lambda: mixed(hf.Gemma2Config, head_dim=16, attn_logit_softcapping=1.0, query_pre_attn_scalar=16),
        (SLIDING, FULL),
    ),
    "gemma3": (lambda: mixed(hf.Gemma3TextConfig, head_dim=16, query_pre_attn_scalar=16), (SLIDING, FULL)),
    "gpt-oss, attention sinks": (lambda: mixed(hf.GptOssConfig, head_dim=16, **EXPERTS), (SLIDING, FULL)),
    "cohere2": (lambda: mixed(hf.Cohere2Config), (SLIDING, FULL)),
    "exaone4": (lambda: mixed(hf.Exaone4Config), (SLIDING, FULL)),
    "olmo3": (lambda: mixed(hf.Olmo3Config), (SLIDING, FULL)),
    "smollm3": (lambda: mixed(hf.SmolLM3Config, use_sliding_window=True), (SLIDING, FULL)),
    "llama4, attention chunks": (lambda: llama4(attn_temperature_tuning=False), (CHUNKED, FULL)),
    # Layers without rope scale queries by positions that they count themselves, which assumes rows of equal lengths.
    "llama4, scaled by position": (lambda: llama4(no_rope_layers=[1, 0], floor_scale=20), (CHUNKED, FULL)),
    # Its layers make their own masks, which assume rows of equal lengths.
    "gpt-neo, local attention": (lambda: hf.GPTNeoConfig(**NEO, window_size=WINDOW), ()),
}


BY_THEMSELVES = {"llama4, scaled by position", "gpt-neo, local attention"}
"""Models whose rows are computed one at a time."""


def save_random(path: Path, config: Any) -> Path:
    """Save a model with random weights and random attention sinks, which a new model leaves uninitialised."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_tiny(path, config)
        model = hf.AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "sinks" in name:
                    weight.normal_(std=0.5)
        model.save_pretrained(path)
    return path


@pytest.fixture(params=MODELS.keys(), scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, LoadedModel]:
    path = save_random(tmp_path_factory.mktemp("windowed") / "model", MODELS[request.param][0]())
    return request.param, path, load_tiny(path)


def test_the_windows_are_those_of_the_models_own_masks(case: tuple[str, Path, LoadedModel]) -> None:
    name, _, model = case
    assert model.windows == MODELS[name][1]
    assert model.packs == (name not in BY_THEMSELVES)
    assert model.batches == (name not in BY_THEMSELVES)


def test_a_model_with_windows_answers_as_the_model_alone(case: tuple[str, Path, LoadedModel]) -> None:
    """With pieces of prompts and without, packed and not, without reuse and with chunks from both tiers."""
    _, path, model = case
    reference = hf.AutoModelForCausalLM.from_pretrained(path).eval()
    prompts = {f"p{length}": tokens_of(length, length) for length in (1, 13, 24, 41, 55)}
    expected = {name: _generated(reference, prompt) for name, prompt in prompts.items()}
    assert len({token for answer in expected.values() for token in answer}) > len(prompts)
    requests = [ask(name, prompt) for name, prompt in prompts.items()]
    for packs in (True, False) if model.packs else (False,):
        served = dataclasses.replace(model, packs=packs)
        cache = MemoryCache(model.chunk_shape(CHUNK))
        for budget in ({"step_prefill_tokens": 512}, {"step_prefill_tokens": 16, "step_prefill_ms": 0}):
            engine = make_engine(served, cache=cache, max_running=3, **budget)
            done = answers(engine.run(requests))
            assert {name: one.token_ids for name, one in done.items()} == expected
            cache.place = lambda index: "remote" if index % 2 else "local"
            requests.reverse()
        assert done["p55"].local_tokens == 24
        assert done["p55"].remote_tokens == 24


def _generated(model: Any, prompt: tuple[int, ...]) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
    answer = made[0, len(prompt) :].tolist()
    return tuple(answer[: answer.index(EOS_ID)] if EOS_ID in answer else answer)


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "one by one"])
def test_the_self_test_misses_no_window(case: tuple[str, Path, LoadedModel], packs: bool) -> None:
    _, _, model = case
    if set(model.windows) <= {FULL}:
        pytest.skip("it has no window to forget")
    with pytest.raises(UserError, match="between the pool and the model alone"):
        check_logits(dataclasses.replace(model, windows=(), packs=packs))


@pytest.fixture(scope="module")
def far_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose window is 300 tokens, so that short prompts do not reveal it."""
    config = tiny(hf.MistralConfig, sliding_window=300, max_position_embeddings=512)
    return save_tiny(tmp_path_factory.mktemp("far") / "odd", config)


def test_a_window_that_begins_at_300_tokens_is_found(far_path: Path) -> None:
    assert set(load_tiny(far_path, max_model_len=320).windows) == {AttentionWindow(300)}


def test_a_model_of_unknown_attention_is_refused_although_it_shows_at_300_tokens_only(
    far_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "find_windows", lambda model, layers, max_len: (FULL,) * layers)
    with pytest.raises(
        UserError, match=r"^model: 'odd' \(MistralForCausalLM\) is refused: its logits at position 30\d"
    ):
        load_tiny(far_path, max_model_len=320)
    assert load_tiny(far_path, max_model_len=300).packs


def test_local_attention_of_rows_of_unequal_lengths_is_computed_row_by_row(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "neo", hf.GPTNeoConfig(**NEO, window_size=300))
    assert not load_tiny(path, max_model_len=320).batches
    assert load_tiny(path, max_model_len=300).batches


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (hf.LlamaConfig(**LAYERS_OF_TWO), 40),
        (hf.LlamaConfig(**LAYERS_OF_TWO, rope_parameters=LLAMA3 | {"original_max_position_embeddings": 100}), 40),
        (
            hf.Ministral3Config(
                **LAYERS_OF_TWO,
                rope_parameters=YARN | {"original_max_position_embeddings": 100, "llama_4_scaling_beta": 0.5},
            ),
            108,
        ),
        (tiny(hf.MistralConfig, sliding_window=150), 158),
        (tiny(hf.MistralConfig, sliding_window=190), 192),
        (tiny(hf.MistralConfig, sliding_window=192), 40),
        (hf.Llama4TextConfig(**LAYERS_OF_TWO, floor_scale=130, attention_chunk_size=70), 138),
    ],
)
def test_the_self_test_goes_past_the_largest_border_that_a_row_crosses(
    qwen2: LoadedModel, config: Any, tokens: int
) -> None:
    model = hf.AutoModelForCausalLM.from_config(config)
    assert support._self_test_tokens(dataclasses.replace(qwen2, model=model, max_len=192)) == tokens


@settings(max_examples=40)
@given(
    size=st.integers(2, 20), chunked=st.booleans(), start=st.integers(0, 30), count=st.integers(1, 12), seen=st.data()
)
def test_a_mask_is_that_of_the_library(size: int, chunked: bool, start: int, count: int, seen: st.DataObject) -> None:
    window = AttentionWindow(size, chunked)
    positions = torch.arange(start, start + count)
    begin, end = seen.draw(st.integers(0, start)), start + count
    function = (
        chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long))
        if chunked
        else sliding_window_causal_mask_function(size)
    )
    expected: Any = sdpa_mask(1, count, end, q_offset=start, mask_function=function, allow_is_causal_skip=False)
    assert torch.equal(window.mask(positions, begin, end), expected[0, 0, :, begin:])
    assert not expected[..., : window.first_seen(start)].any()
    assert attention_window._window_of(function, size, 40) == (window if size < 40 else FULL)


def test_a_model_that_counts_positions_itself_takes_no_packed_pass(tmp_path: Path) -> None:
    """The model is recognised even if the effect begins at a far position."""
    config = tiny(hf.Llama4TextConfig, head_dim=16, intermediate_size_mlp=64, no_rope_layers=[1, 0], **EXPERTS)
    model = load_tiny(save_tiny(tmp_path / "counts", config))
    assert config.floor_scale > MAX_LEN
    assert not model.packs
    assert model.batches


def test_a_mask_of_another_kind_is_none_of_the_windows() -> None:
    def every_other(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (key % 2 == 0)

    with pytest.raises(ValueError, match="neither causal, sliding nor chunked"):
        attention_window._window_of(every_other, 4, 40)


def test_models_of_other_windows_share_no_chunks() -> None:
    configs = [
        mixed(hf.Olmo3Config),
        mixed(hf.Olmo3Config, sliding_window=WINDOW + 1),
        tiny(hf.Olmo3Config, layer_types=["full_attention", "sliding_attention"]),
        tiny(hf.Olmo3Config, layer_types=["full_attention", "full_attention"]),
    ]
    assert len({settings_of(config) for config in configs}) == len(configs)

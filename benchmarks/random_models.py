"""Models with random weights in the shapes of real ones, and the least work of their passes.

Needs only PyTorch and transformers, so it runs on a bare machine with a GPU.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from benchmarks.ceilings import ModelCosts
from cache.protocol import ChunkShape
from inference_service.attention_interface import SDPA
from inference_service.attention_window import AttentionWindow
from inference_service.kv_pool import KVPool
from inference_service.packed_linear import pack_linears
from inference_service.runner import Runner

QWEN2_5: dict[str, Any] = {"vocab_size": 151_936, "max_position_embeddings": 32_768, "rope_theta": 1e6}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-0.5b": (
        "Qwen2.5-0.5B",
        QWEN2_5
        | {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2.5-7b": (
        "Qwen2.5-7B",
        QWEN2_5
        | {
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
        },
    ),
    "default": (
        "random-qwen2-30m",
        {
            "vocab_size": 258,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
        },
    ),
    "tiny": (
        "tiny",
        {
            "vocab_size": 258,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
        },
    ),
}
"""Name in results and configuration of each shape. The Qwen2.5 shapes are the published ones (config.json). `default`
is the model of `inference_service/default_model.py`. `tiny` is for trying this program."""


@dataclass(frozen=True)
class RandomModel:
    """A model with random weights, with the attributes of a loaded model that `Runner` needs."""

    name: str
    model: Any
    device: torch.device
    dtype: torch.dtype
    packs: bool = True
    batches: bool = True
    windows: tuple[AttentionWindow, ...] = ()

    @property
    def config(self) -> Any:
        return self.model.config


def build(shape: str, device: torch.device, dtype: torch.dtype) -> RandomModel:
    """Build a model. Weights are made on the device in their dtype, without a second copy; layers are the engine's."""
    name, settings = SHAPES[shape]
    config = Qwen2Config(**settings)
    with torch.device("meta"):
        model: Any = Qwen2ForCausalLM(config)
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=config.initializer_range, generator=generator)
            else:
                weight.fill_(0.0)
        for module_name, module in model.named_modules():
            if module_name.endswith("norm"):
                module.weight.fill_(1.0)
    # The table of rotary angles is not a weight, so it has to be computed again on the device.
    with device:
        model.model.rotary_emb = Qwen2RotaryEmbedding(config)
    model = model.eval().requires_grad_(False)
    pack_linears(model)
    model.set_attn_implementation(SDPA)
    return RandomModel(name, model, device, dtype)


def costs_of(config: Any, dtype: torch.dtype) -> ModelCosts:
    """Least work of every pass, derived from the configuration.

    The embedding table is not multiplied: one row is read per token. If it is also the output matrix, it is read
    whole. The output matrix is multiplied only for the last token of a row. Each pair of tokens costs one product with
    a key and one with a value in every attention head.
    """
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head_dim = hidden // config.num_attention_heads
    kv_size = config.num_key_value_heads * head_dim
    matrices = layers * (2 * hidden * hidden + 2 * hidden * kv_size + 3 * hidden * inner)
    vectors = layers * (hidden + 2 * kv_size + 2 * hidden) + hidden
    head = hidden * config.vocab_size
    return ModelCosts(
        weight_bytes=(matrices + vectors + head) * dtype.itemsize,
        kv_bytes_per_token=2 * layers * kv_size * dtype.itemsize,
        flops_per_token=2 * matrices,
        head_flops=2 * head,
        attention_flops=4 * layers * hidden,
    )


def shape_bytes(shape: str, dtype: torch.dtype) -> int:
    """Size of all weights of a shape, including an embedding table that is not the output matrix."""
    config = Qwen2Config(**SHAPES[shape][1])
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * dtype.itemsize
    return costs_of(config, dtype).weight_bytes + table


def make_runner(model: RandomModel, rows: int, max_len: int, chunk_tokens: int) -> Runner:
    """Return our runner over our pool, as for a loaded model."""
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    shape = ChunkShape(config.num_hidden_layers, config.num_key_value_heads, chunk_tokens, head_dim, model.dtype)
    return Runner(model, KVPool(shape, rows, max_len, model.device))  # type: ignore[arg-type]

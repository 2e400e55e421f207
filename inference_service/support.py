"""Refuse, at load, a model that the pool would run wrong.

The pool holds keys and values of one shape in every layer, for all positions, under a causal mask. The configuration
tells of most models that need something else; a self-test against the model's own forward pass finds the rest.
"""

from typing import Any

import torch

from core.errors import UserError
from inference_service.kv_pool import KVPool
from inference_service.model import LoadedModel
from inference_service.runner import Runner

SELF_TEST_TOKENS = 40
_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 2e-2}
"""Largest difference of logits, as a share of their largest magnitude, that rounding may explain."""


def check_supported(model: LoadedModel) -> None:
    """Raises `UserError` that names the layer or setting which the pool cannot hold exactly."""
    _check_config(model)
    _self_test(model)


def _check_config(model: LoadedModel) -> None:
    config = model.model.config.get_text_config()
    for index, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in ("full_attention", "sliding_attention", "attention"):
            raise _refusal(model, f"layer {index} is {kind!r}, which keeps no key/value per token in a row of the pool")
    if getattr(config, "kv_lora_rank", None):
        raise _refusal(model, "its latent attention (kv_lora_rank) has keys and values of different sizes")
    if getattr(config, "add_cross_attention", False):
        raise _refusal(model, "it has cross attention (add_cross_attention)")
    _check_rope(model, config)
    window = _window(config)
    if window is not None and window < model.max_len:
        raise _refusal(
            model,
            f"layers attend over a window of {window} tokens, less than the {model.max_len} that a row holds; "
            f"set --max-model-len to at most {window}",
        )


def _check_rope(model: LoadedModel, config: Any) -> None:
    """LongRoPE turns all keys by other angles once a sequence is long: chunks of short and long ones differ."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        limit = rope.get("original_max_position_embeddings")
        if rope.get("rope_type") == "longrope" and limit is not None and limit < model.max_len:
            raise _refusal(
                model,
                f"its positions (rope_type longrope) change for sequences above {limit} tokens, less than the "
                f"{model.max_len} that a row holds; set --max-model-len to at most {limit}",
            )


def _window(config: Any) -> int | None:
    """The shortest span that a layer attends to, where some layer does not attend to everything."""
    spans = [getattr(config, "attention_chunk_size", None)]
    if getattr(config, "use_sliding_window", True):
        kinds = getattr(config, "layer_types", None)
        if kinds is None or "sliding_attention" in kinds:
            spans.append(getattr(config, "sliding_window", None))
    if getattr(config, "attention_types", None) and "local" in str(config.attention_types):  # GPT-Neo
        spans.append(getattr(config, "window_size", None))
    return min((int(span) for span in spans if span), default=None)


@torch.inference_mode()
def _self_test(model: LoadedModel) -> None:
    """One short prompt must give the same logits by the model alone and in pieces, with reuse, over the pool."""
    tokens = [(7 * index + 3) % model.vocab_size for index in range(max(3, min(SELF_TEST_TOKENS, model.max_len)))]
    chunk = max(1, len(tokens) // 4)
    try:
        ids = torch.tensor([tokens], device=model.device)
        expected = model.model(input_ids=ids, use_cache=False).logits[0].float()
        shape = model.chunk_shape(chunk)
        pool = KVPool(shape, rows=2, max_len=len(tokens), device=model.device)
        runner = Runner(model, pool)
        # Row 0 computes two chunks; row 1 gets the first by reuse and stands one token behind row 0 when both decode.
        first = runner.prefill(0, tokens[: 2 * chunk], 0)
        copy = torch.empty(shape.size, dtype=shape.dtype)
        pool.read_chunk(0, 0, copy)
        pool.load_chunk(1, 0, copy)
        second = runner.prefill(1, tokens[chunk : 2 * chunk - 1], chunk) if chunk > 1 else None
        lengths = [2 * chunk, 2 * chunk - 1]
        both = runner.decode([tokens[length] for length in lengths], lengths)
    except Exception as error:  # whatever a model of unknown make raises, the answer is the same: not this one
        raise _refusal(model, f"it does not run over the pool: {type(error).__name__}: {error}") from error
    found = {2 * chunk - 1: first, 2 * chunk: both[0]}
    if second is not None:
        found[2 * chunk - 2] = second
    tolerance = _TOLERANCE[model.dtype] * float(expected.abs().max().clamp(min=1e-6))
    for position, logits in (*found.items(), (2 * chunk - 1, both[1])):
        error_size = float((logits.float() - expected[position]).abs().max())
        if not error_size <= tolerance:
            raise _refusal(
                model,
                f"its logits at position {position} differ by {error_size:.2g} between the pool and the model alone "
                f"(allowed {tolerance:.2g}); its attention is of a kind that the pool does not hold",
            )


def _refusal(model: LoadedModel, reason: str) -> UserError:
    line = " ".join(reason.split())[:400]
    return UserError(f"model: {model.name!r} ({type(model.model).__name__}) is refused: {line}")

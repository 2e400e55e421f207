"""Refuse, at load, a model that the pool would run wrong.

The pool holds keys and values of one shape in every layer, for all positions, under a causal mask. The configuration
tells of most models that need something else; a self-test against the model's own forward pass finds the rest.
"""

import logging
from dataclasses import replace
from typing import Any

import torch

from core.errors import UserError
from inference_service.kv_pool import KVPool
from inference_service.model import LoadedModel
from inference_service.packed_pass import ATTENTION
from inference_service.pieces import Piece
from inference_service.runner import Runner

logger = logging.getLogger(__name__)

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


def with_packing(model: LoadedModel) -> LoadedModel:
    """The model, set to packed passes where those give its own logits; else as it is: slower, and as right."""
    attention = model.model.config._attn_implementation
    if attention != "sdpa":
        return model
    packing = replace(model, packs=True)
    try:
        model.model.set_attn_implementation(ATTENTION)
        _self_test(packing)
    except Exception as error:  # whatever it raises, it is served without
        logger.info("%s takes no packed passes: %s", model.name, " ".join(str(error).split())[:400])
        model.model.set_attn_implementation(attention)
        return model
    return packing


def _self_test(model: LoadedModel) -> None:
    try:
        compared = _logits_both_ways(model)
    except Exception as error:  # whatever a model of unknown make raises, the answer is the same: not this one
        raise _refusal(model, f"it does not run over the pool: {type(error).__name__}: {error}") from error
    for position, found, expected in compared:
        tolerance = _TOLERANCE[model.dtype] * float(expected.abs().max().clamp(min=1e-6))
        error_size = float((found.float() - expected).abs().max())
        if not error_size <= tolerance:
            raise _refusal(
                model,
                f"its logits at position {position} differ by {error_size:.2g} between the pool and the model alone "
                f"(allowed {tolerance:.2g}); its attention is of a kind that the pool does not hold",
            )


@torch.inference_mode()
def _logits_both_ways(model: LoadedModel) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """Of short prompts in pieces, with reuse and together: position, logits over the pool, logits by the model alone.

    Logits are `[vocabulary]`.
    """
    count = max(3, min(SELF_TEST_TOKENS, model.max_len))
    one, other = ([(step * index + 3) % model.vocab_size for index in range(count)] for step in (7, 11))
    prompts = (one, one, other)  # of each row
    chunk = max(1, count // 4)
    alone = [model.model(input_ids=torch.tensor([prompt], device=model.device), use_cache=False) for prompt in prompts]
    shape = model.chunk_shape(chunk)
    pool = KVPool(shape, rows=len(prompts), max_len=count, device=model.device)
    runner = Runner(model, pool)
    compared: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def run(*spans: tuple[int, int, int]) -> None:
        """A pass over what stands in `row` from `start` to before `end`, of each of the spans."""
        pieces = [Piece(row, start, prompts[row][start:end]) for row, start, end in spans if end > start]
        for piece, found in zip(pieces, runner.forward(pieces), strict=True):
            compared.append((piece.end - 1, found, alone[piece.row].logits[0, piece.end - 1].float()))

    # Row 0 computes two chunks; row 1 gets the first by reuse, goes on from there while row 0 decodes and row 2 begins,
    # and stands two tokens behind row 0 when all decode.
    run((0, 0, 2 * chunk))
    copy = torch.empty(shape.size, dtype=shape.dtype)
    pool.read_chunk(0, 0, copy)
    pool.load_chunk(1, 0, copy)
    last = min(2 * chunk + 1, count - 1)
    run((0, 2 * chunk, last), (1, chunk, 2 * chunk - 1), (2, 0, chunk))
    run((0, last, last + 1), (1, 2 * chunk - 1, 2 * chunk), (2, chunk, chunk + 1))
    return compared


def _refusal(model: LoadedModel, reason: str) -> UserError:
    line = " ".join(reason.split())[:400]
    return UserError(f"model: {model.name!r} ({type(model.model).__name__}) is refused: {line}")

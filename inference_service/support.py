"""Refuse, at load, a model that the pool would run wrong.

The pool has keys and values of one shape in every layer, for all positions. Each layer attends to all positions, to a
sliding window or to a chunk. The configuration reveals most models that need something else. A self-test against the
model's own forward pass finds the rest.

Passes and model have the same logits up to rounding. In float32 this gives the same answer in every batch. In bfloat16
and float16 rounding is coarser, and an answer may depend on the batch.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from core.errors import UserError
from inference_service.active_sequence import Piece
from inference_service.attention_interface import OURS
from inference_service.attention_window import find_windows
from inference_service.kv_pool import KVPool
from inference_service.model import LoadedModel
from inference_service.runner import Runner

logger = logging.getLogger(__name__)

SELF_TEST_TOKENS = 40
"""Least number of tokens of the self-test. Lengths in the configuration may require more."""
_BEYOND_BORDER = 8
_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 2e-2}
"""Maximum difference of logits that rounding may cause, as a share of their largest magnitude."""


def checked(model: LoadedModel) -> LoadedModel:
    """Return the model, set to the largest passes that give its own logits, up to rounding in its dtype.

    Raises `UserError` that names the layer or setting for which the pool is not exact.
    """
    _check_config(model)
    model = with_packing(model)
    if not model.packs:
        model = _with_batches(model)
    return model


def _check_config(model: LoadedModel) -> None:
    config = model.model.config.get_text_config()
    for index, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in ("full_attention", "sliding_attention", "chunked_attention", "attention"):
            raise _refusal(model, f"layer {index} is {kind!r}, which keeps no key/value per token in a row of the pool")
    if getattr(config, "kv_lora_rank", None):
        raise _refusal(model, "its latent attention (kv_lora_rank) has keys and values of different sizes")
    if getattr(config, "add_cross_attention", False):
        raise _refusal(model, "it has cross attention (add_cross_attention)")
    _check_rope(model, config)


def _check_rope(model: LoadedModel, config: Any) -> None:
    """Refuse LongRoPE beyond its original length: it then rotates all keys differently, so cached chunks differ."""
    for rope in _rope_settings(config):
        limit = rope.get("original_max_position_embeddings")
        if rope.get("rope_type") == "longrope" and limit is not None and limit < model.max_len:
            raise _refusal(
                model,
                f"its positions (rope_type longrope) change for sequences above {limit} tokens, less than the "
                f"{model.max_len} that a row holds; set --max-model-len to at most {limit}",
            )


def _rope_settings(config: Any) -> Iterator[dict[str, Any]]:
    """The settings of rope: those of all layers, or of each type of layer if they differ."""
    parameters = getattr(config, "rope_parameters", None) or {}
    yield parameters
    yield from (value for value in parameters.values() if isinstance(value, dict))


def with_packing(model: LoadedModel) -> LoadedModel:
    """Return the model, set to packed passes if they give its own logits; otherwise unchanged, slower but right."""
    attention = model.model.config._attn_implementation
    if attention not in OURS or not model.model._can_set_attn_implementation():
        return model
    try:
        model.model.set_attn_implementation(OURS[attention])
        model = replace(model, windows=find_windows(model.model, model.chunk_shape(1).layers, model.max_len))
        packing = replace(model, packs=True)
        check_logits(packing)
    except Exception as error:  # after any error the model is served without packed passes
        logger.info("%s takes no packed passes: %s", model.name, " ".join(str(error).split())[:400])
        model.model.set_attn_implementation(attention)
        return model
    return packing


def _with_batches(model: LoadedModel) -> LoadedModel:
    """Return the model, set to compute rows together if that gives its own logits, otherwise each row alone."""
    try:
        check_logits(model)
    except UserError as error:
        model = replace(model, batches=False)
        try:
            check_logits(model)
        except UserError:
            raise error from None
        logger.info("%s computes each row by itself: %s", model.name, error)
    return model


def check_logits(model: LoadedModel) -> None:
    """Run the self-test. Raises `UserError` if logits over the pool differ from those of the model alone."""
    try:
        compared = _logits_both_ways(model)
    except Exception as error:  # an unknown model may raise anything, and is refused in any case
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
    """Positions with logits over the pool and logits of the model alone: prompts in pieces, with reuse, and together.

    Logits are `[vocabulary]`. This costs as much as about three prompts of `_self_test_tokens`.
    """
    count = _self_test_tokens(model)
    chunk = max(1, (count - 4) // 2)
    short = min(chunk, SELF_TEST_TOKENS // 2)
    one = [(7 * index + 3) % model.vocab_size for index in range(count)]
    other = [(11 * index + 3) % model.vocab_size for index in range(short + 1)]
    prompts = (one, one, other)  # of each row
    shape = model.chunk_shape(chunk)
    pool = KVPool(shape, rows=len(prompts), max_len=count, device=model.device)
    runner = Runner(model, pool)
    compared: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    alone = {id(one): _logits_alone(model, one), id(other): _logits_alone(model, other)}

    def run(*spans: tuple[int, int, int]) -> None:
        """Run a pass over the tokens from `start` to before `end` of `row`, for each span `(row, start, end)`."""
        pieces = [Piece(row, start, prompts[row][start:end]) for row, start, end in spans if end > start]
        for piece, found in zip(pieces, runner.forward(pieces), strict=True):
            prompt = prompts[piece.row]
            compared.append((piece.end - 1, found, alone[id(prompt)][piece.end - 1 - len(prompt)].float()))

    # Row 0 computes two chunks. Row 1 reuses the first and continues from there while row 0 decodes and row 2 begins.
    # When all decode, rows 0 and 1 have similar lengths.
    run((0, 0, 2 * chunk))
    copy = torch.empty(shape.size, dtype=shape.dtype)
    pool.chunk_reader(0, chunk)(0, copy)
    pool.load_chunks(1, [copy])
    last, behind = min(2 * chunk + 1, count - 1), count - 1
    run((0, 2 * chunk, last), (1, chunk, behind), (2, 0, short))
    run((0, last, last + 1), (1, behind, behind + 1), (2, short, short + 1))
    return compared


@torch.inference_mode()
def _logits_alone(model: LoadedModel, prompt: list[int]) -> torch.Tensor:
    """Logits of the model's own forward pass at the last positions of `prompt`, `[positions, vocabulary]`."""
    output = model.model(
        input_ids=torch.tensor([prompt], device=model.device),
        use_cache=False,
        logits_to_keep=min(len(prompt), _BEYOND_BORDER),
    )
    logits: torch.Tensor = output.logits[0]
    return logits


def _self_test_tokens(model: LoadedModel) -> int:
    """Length of the self-test. It is beyond the largest length that a row can cross and where attention changes."""
    config = model.model.config.get_text_config()
    borders = [*_numbers_of_attention(config.to_dict()), *(window.size or 0 for window in model.windows)]
    crossed = max((border for border in borders if border < model.max_len), default=0)
    return max(3, min(model.max_len, max(SELF_TEST_TOKENS, crossed + _BEYOND_BORDER)))


_CHANGES_ATTENTION = re.compile("window|chunk|block|local|span|position|length|context|ctx|seq|floor|keep|sparse")
"""Matches names of settings that may be a length at which attention changes."""
_ROPE_BY_LENGTH = ("dynamic", "longrope")


def _numbers_of_attention(settings: dict[str, Any]) -> Iterator[int]:
    """Integers of the configuration that may be a length at which attention changes."""
    # Other types of rope rotate each position by the same angles at any length.
    static_rope = "rope_type" in settings and settings["rope_type"] not in _ROPE_BY_LENGTH
    scales_by_position = settings.get("llama_4_scaling_beta")
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _numbers_of_attention(value)
        elif name == "original_max_position_embeddings" and static_rope and not scales_by_position:
            continue
        elif isinstance(value, int) and not isinstance(value, bool) and _CHANGES_ATTENTION.search(name):
            yield value


def _refusal(model: LoadedModel, reason: str) -> UserError:
    line = " ".join(reason.split())[:400]
    return UserError(f"model: {model.name!r} ({type(model.model).__name__}) is refused: {line}")

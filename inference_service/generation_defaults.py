"""Sampling parameters of a model's `generation_config.json`, and those that the engine does not honour."""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import xxhash
from pydantic import ValidationError

from core.errors import UserError, one_line
from core.records import Request, Sampling
from inference_service.sequence_sampler import TokenRules

logger = logging.getLogger(__name__)

_HONOURED = frozenset(
    (
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "min_new_tokens",
        "suppress_tokens",
        "begin_suppress_tokens",
        "forced_eos_token_id",
    )
)
_OF_REQUEST = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "min_new_tokens",
)
"""Parameters that a request may give, by the same name in `Request` and `Sampling`."""
_NOT_OF_THE_CHOICE = frozenset(
    (
        # The engine handles these itself: end tokens come with the model, lengths with a request, rows are the cache.
        "eos_token_id",
        "pad_token_id",
        "bos_token_id",
        "max_length",
        "max_new_tokens",
        "use_cache",
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "prefill_chunk_size",
        "compile_config",
        "disable_compile",
        "continuous_batching_config",
        "low_memory",
        # The return values of `generate`, and the origin of the file.
        "return_dict_in_generate",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "transformers_version",
        # They change nothing without beams, an encoder or a drafting model.
        "length_penalty",
        "early_stopping",
        "diversity_penalty",
        "encoder_repetition_penalty",
        "encoder_no_repeat_ngram_size",
        "decoder_start_token_id",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "target_lookbehind",
        "renormalize_logits",
    )
)


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling parameters that a request does not set. The default is greedy."""

    sampling: Sampling = field(default_factory=Sampling)
    rules: TokenRules = field(default_factory=TokenRules)

    def of(self, request: Request) -> Sampling:
        """The sampling parameters of `request`: its own, and these defaults for those that it does not set.

        The seed is the request's, or derived from its id; none for greedy sampling.
        """
        given = {name: value for name in _OF_REQUEST if (value := getattr(request, name)) is not None}
        if given.get("temperature", self.sampling.temperature) > 0:
            given["seed"] = seed_of(request.request_id) if request.seed is None else request.seed
        return self.sampling.model_copy(update=given) if given else self.sampling


def seed_of(request_id: str) -> int:
    """A seed below 2**63, the same for a request id on every host and at any time."""
    return xxhash.xxh3_64_intdigest(request_id.encode(errors="surrogatepass")) >> 1


def read_generation_defaults(
    settings: dict[str, Any], vocabulary: int, end_tokens: Collection[int]
) -> GenerationDefaults:
    """Read a model's defaults from the `settings` of its generation configuration.

    Logs one line that names settings which are not honoured. Raises `UserError` for invalid settings.
    """
    given = {name: value for name, value in settings.items() if value is not None and not name.startswith("_")}
    if ignored := sorted(name for name in given if not _is_known(name) and not _is_neutral(name, given[name])):
        logger.warning(
            "generation_config.json: not honoured: %s", ", ".join(f"{name}={given[name]!r}"[:100] for name in ignored)
        )
    rules = TokenRules(
        suppressed=_ids(given, "suppress_tokens", vocabulary),
        suppressed_first=_ids(given, "begin_suppress_tokens", vocabulary),
        forced_last=_ids(given, "forced_eos_token_id", vocabulary),
    )
    names = ("top_k", "top_p", "min_p", "repetition_penalty", "min_new_tokens")
    fields = {name: given[name] for name in names if name in given}
    try:
        sampling = Sampling(
            # In `generate` a temperature has no effect without `do_sample`.
            temperature=given.get("temperature", 1.0) if given.get("do_sample") else 0.0,
            token_rules=rules.names,
            **fields,
        )
    except ValidationError as error:
        raise _refusal(one_line(error)) from None
    forbidden = {*rules.suppressed, *rules.suppressed_first, *(end_tokens if sampling.min_new_tokens else ())}
    if len(forbidden) >= vocabulary:
        raise _refusal("it forbids every token")
    return GenerationDefaults(sampling, rules)


def _is_known(name: str) -> bool:
    return name in _HONOURED or name in _NOT_OF_THE_CHOICE


def _is_neutral(name: str, value: Any) -> bool:
    """True if the value changes nothing: a factor or count of 1, or a setting that is off."""
    return not value or (value == 1 and value is not True and name != "no_repeat_ngram_size")


def _ids(given: dict[str, Any], name: str, vocabulary: int) -> tuple[int, ...]:
    """The token ids of a setting. As in `generate`, ids outside of the vocabulary are left out."""
    value = given.get(name, ())
    listed = [value] if isinstance(value, int) else value
    if not isinstance(listed, list | tuple) or not all(isinstance(token, int) for token in listed):
        raise _refusal(f"{name} is no token id and no list of them")
    return tuple(token for token in listed if 0 <= token < vocabulary)


def _refusal(reason: str) -> UserError:
    return UserError(f"generation_config.json: {reason}; mend it, or choose --sampling-defaults neutral")

"""Load a causal language model of `transformers`, by path or name, and identify it by content."""

import hashlib
import json
import logging
import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.peft_utils import find_adapter_config_file

from cache.protocol import ChunkShape, ModelIdentity
from core.errors import UserError
from core.model_path import model_folder
from inference_service.attention_window import AttentionWindow
from inference_service.config import DTYPES, EngineConfig, SamplingDefaults
from inference_service.default_model import default_model_path
from inference_service.generation_defaults import GenerationDefaults, read_generation_defaults
from inference_service.kv_pool import KVPool
from inference_service.memory import check_memory, no_room_for_rows, weight_bytes
from inference_service.prompt_encoder import PromptEncoder
from inference_service.runner import Runner

if TYPE_CHECKING:
    from inference_service.grammar_compiler import Grammars

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, ready for the engine."""

    name: str
    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    identity: ModelIdentity
    max_len: int
    """Maximum length of a sequence: `max_model_len`, or the model's own limit if that is less."""
    eos_token_ids: frozenset[int]
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    """Sampling parameters that a request does not set."""
    own_limit: str | None = None
    """The model's own limit, if that is `max_len`; none if `max_model_len` could raise it."""
    allow_special_tokens: bool = False
    packs: bool = False
    """True if the self-test has shown that it computes pieces of several sequences in one pass."""
    batches: bool = True
    """True if it computes single tokens of rows of unequal lengths in one pass. Only used if it does not pack."""
    windows: tuple[AttentionWindow, ...] = ()
    """The window of each layer. Empty: every layer attends to all earlier tokens."""

    @property
    def vocab_size(self) -> int:
        return int(self.model.get_input_embeddings().num_embeddings)

    @cached_property
    def prompt_encoder(self) -> PromptEncoder:
        return PromptEncoder(self.tokenizer, self.name, self.allow_special_tokens)

    @cached_property
    def grammars(self) -> "Grammars":
        from inference_service.grammar_compiler import Grammars  # noqa: PLC0415 - most jobs need no grammar

        return Grammars(self.tokenizer, self.eos_token_ids)

    def chunk_shape(self, chunk_tokens: int) -> ChunkShape:
        return chunk_shape(self.model.config.get_text_config(), chunk_tokens, self.dtype)

    def make_runner(self, rows: int, chunk_tokens: int) -> Runner:
        """A runner over a pool of `rows` rows. Raises `UserError` if the device has no memory for it."""
        shape = self.chunk_shape(chunk_tokens)
        try:
            return Runner(self, KVPool(shape, rows, self.max_len, self.device))
        except torch.AcceleratorError:
            raise
        except RuntimeError as error:  # the allocators of both devices raise it
            raise no_room_for_rows(self.name, rows * row_bytes(shape, self.max_len), self.device) from error

    def wait_for_device(self) -> None:
        """Wait for copies into the pool: on a GPU they may still run when the call that started them has returned."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def chunk_shape(config: Any, chunk_tokens: int, dtype: torch.dtype) -> ChunkShape:
    """Shape of the keys and values of `chunk_tokens` tokens, for a model with this (text) configuration."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ChunkShape(config.num_hidden_layers, heads, chunk_tokens, head_dim, dtype)


def row_bytes(shape: ChunkShape, max_len: int) -> int:
    """Memory of one row of `max_len` tokens in a pool for chunks of this shape."""
    return shape.size_bytes * max_len // shape.chunk_tokens


def resolve_device(device: str, slot: int) -> torch.device:
    """The device of slot `slot`. `auto` and `cuda` assign the GPUs to the slots in turn.

    Raises `UserError` if the GPU does not exist.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise UserError(f"device: {device!r} asks for a GPU and there is none; use cpu or auto")
    index = int(device.removeprefix("cuda:")) if device.startswith("cuda:") else slot % count
    if index >= count:
        raise UserError(f"device: there is no {device!r} among {count} GPUs")
    return torch.device("cuda", index)


def resolve_model(model: str) -> tuple[str, str]:
    """Return `(source for transformers, name in results)` of a path, a hub name, or `default`.

    Raises `UserError` for a path without a model.
    """
    if model == "default":
        path = default_model_path()
        return str(path), path.name
    folder = model_folder(model)
    if folder is not None:
        return str(folder), folder.name
    return model, model


def resolve_dtype(dtype: str, device: torch.device, model_config: Any) -> torch.dtype:
    """The dtype named, or for `auto` the checkpoint's on a GPU and float32 on a CPU."""
    if dtype == "auto":
        own = getattr(model_config.get_text_config(), "dtype", None) or getattr(model_config, "dtype", None)
        name = str(own).removeprefix("torch.")
        dtype = name if device.type == "cuda" and name in DTYPES else "float32"
    return getattr(torch, dtype)  # type: ignore[no-any-return]


def load_model(config: EngineConfig, slot: int = 0) -> LoadedModel:
    """Load weights and tokenizer. Raises `UserError` if that is not possible."""
    device = resolve_device(config.device, slot)
    source, name = resolve_model(config.model)
    try:
        # Without this argument the library would ask on stdin if it may run the model's own code.
        model_config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if getattr(model_config, "is_encoder_decoder", False):
            raise UserError(f"model: {name!r} is an encoder-decoder; the engine runs decoder-only causal models")
        if find_adapter_config_file(source):
            raise UserError(
                f"model: beside the weights of {name!r} is an adapter (adapter_config.json), which would not be used; "
                "merge it into the weights and save those, or move it away"
            )
        dtype = resolve_dtype(config.dtype, device, model_config)
        text_config = model_config.get_text_config()
        max_len, own_limit = _longest(text_config, config.max_model_len, name)
        if hasattr(text_config, "num_attention_heads"):  # others are refused once they are loaded
            pool = config.max_running * row_bytes(chunk_shape(text_config, 1, dtype), max_len)
            check_memory(name, weight_bytes(source, dtype), pool, dtype, device)
        tokenizer = _load_tokenizer(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    except UserError:
        raise
    except Exception as error:  # the library and the readers of its file formats raise errors of every kind
        raise UserError(f"model: cannot load {config.model!r}{_why(config.model, error)}") from error
    model, loading = loaded
    _check_weights(name, loading)
    model = model.to(device).eval().requires_grad_(False)
    eos_token_ids = _end_tokens(model, tokenizer)
    generation = GenerationDefaults()
    if config.sampling_defaults is SamplingDefaults.MODEL:
        vocabulary = model.get_input_embeddings().num_embeddings
        generation = read_generation_defaults(model.generation_config.to_dict(), vocabulary, eos_token_ids)
    return LoadedModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        identity=ModelIdentity(
            _weights_digest(model), _tokenizer_digest(tokenizer), _settings(model.config.get_text_config())
        ),
        max_len=max_len,
        eos_token_ids=eos_token_ids,
        own_limit=own_limit,
        allow_special_tokens=config.allow_special_tokens,
        generation=generation,
    )


def _why(asked: str, error: Exception) -> str:
    """The reason, as the rest of a line that names the model."""
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return ": it has Python code of its own (auto_map), which is not run; choose a model that transformers has"
    is_on_hub = asked != "default" and model_folder(asked) is None
    offline = " (HF_HUB_OFFLINE is set)" if is_on_hub and os.environ.get("HF_HUB_OFFLINE") == "1" else ""
    return f"{offline}: {reason[:300]}"


def _longest(config: Any, max_model_len: int, name: str) -> tuple[int, str | None]:
    """Maximum length of a sequence in tokens, and the limit's name if `max_model_len` cannot raise it."""
    own = getattr(config, "max_position_embeddings", None)
    if own is None or own > max_model_len:
        return max_model_len, None
    limit = "max_position_embeddings"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "yarn" and rope.get("original_max_position_embeddings"):
        reach = int(rope.get("factor", 1.0) * rope["original_max_position_embeddings"])
        if reach > own:
            limit += f", which its config.json may raise to the {reach} of its YaRN"
    if own < max_model_len:
        logger.warning("--max-model-len %d is cut to %d for %r: its own limit (%s)", max_model_len, own, name, limit)
    return own, limit


def _check_weights(name: str, loading: Any) -> None:
    """Refuse missing and unexpected weights. The library fills the former with random numbers and drops the latter.

    It only warns of both. It does not list what it drops on purpose, such as buffers of older versions.
    """
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"model: the weights of {name!r} are incomplete: {', '.join(missing[:3])} missing; save the model again"
        )
    if left := sorted(loading["unexpected_keys"]):
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise UserError(
            f"model: the weights of {name!r} hold {', '.join(left[:3])}{more}, which its config.json has no place for; "
            "mend that, or save the model again"
        )


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: by the generation configuration, the model's configuration or the tokenizer."""
    configs = (model.generation_config, model.config, model.config.get_text_config(), tokenizer)
    found: set[int] = set()
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or ())
    return frozenset(found)


def _load_tokenizer(source: str) -> Any:
    declared = get_tokenizer_config(source).get("tokenizer_class")
    # tokenizer.json has all of a generic tokenizer. For some architectures (Qwen2) AutoTokenizer would replace the
    # saved normalisation and special tokens by the architecture's usual ones.
    loader: Any = PreTrainedTokenizerFast if declared == "TokenizersBackend" else AutoTokenizer
    tokenizer = loader.from_pretrained(source, trust_remote_code=False)
    # If the files are missing, the library silently makes a tokenizer without a vocabulary.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"model: there is no tokenizer in {source!r}; save one beside the weights")
    return tokenizer


def _weights_digest(model: torch.nn.Module) -> str:
    """Digest of the weights as loaded. Equal weights have equal digests, whatever file or conversion they come from."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().contiguous().cpu().flatten()
        digest.update(f"{name}|{flat.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def _tokenizer_digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


_NOT_COMPUTED_WITH = {"dtype", "torch_dtype", "transformers_version", "use_cache"}


def _settings(config: Any) -> str:
    """Settings of the configuration that determine how weights are used: positions (rope), activation, norms, ..."""
    settings = config.to_dict()
    used = {name: settings[name] for name in settings if name not in _NOT_COMPUTED_WITH and not name.startswith("_")}
    return json.dumps(used, sort_keys=True, default=str)

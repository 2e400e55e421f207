"""Load a causal language model of `transformers`, by path or name, and identify it by content."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from cache.protocol import ChunkShape, ModelIdentity
from core.config import EngineConfig, SamplingDefaults
from core.errors import UserError
from core.model_path import model_folder
from inference_service.attention_window import AttentionWindow
from inference_service.default_model import default_model_path
from inference_service.generation_defaults import GenerationDefaults, read_generation_defaults
from inference_service.kv_pool import KVPool
from inference_service.runner import Runner


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
    """Longest sequence the engine may hold: `max_model_len`, or the model's own limit where that is less."""
    eos_token_ids: frozenset[int]
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    """How tokens are chosen where a request does not say."""
    packs: bool = False
    """Whether it is known to compute pieces of several sequences in one pass."""
    batches: bool = True
    """Where it does not pack: whether it computes single tokens of rows of unequal lengths in one pass."""
    windows: tuple[AttentionWindow, ...] = ()
    """What each layer attends to. Empty: everything, in all layers."""

    @property
    def vocab_size(self) -> int:
        return int(self.model.get_input_embeddings().num_embeddings)

    def chunk_shape(self, chunk_tokens: int) -> ChunkShape:
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return ChunkShape(config.num_hidden_layers, heads, chunk_tokens, head_dim, self.dtype)

    def make_runner(self, rows: int, chunk_tokens: int) -> Runner:
        """A runner over a pool of `rows` rows."""
        return Runner(self, KVPool(self.chunk_shape(chunk_tokens), rows, self.max_len, self.device))

    def wait_for_device(self) -> None:
        """On a GPU the copies into a pool may still be under way when the call that asked for them is back."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def resolve_device(device: str, slot: int) -> torch.device:
    """The device of slot `slot`: `auto` and `cuda` give each slot a GPU of its own, round robin.

    Raises `UserError` where the GPU asked for does not exist.
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
    """`(what transformers loads, the name in results)` of a path, a hub name, or `default`.

    Raises `UserError` for a path that holds no model.
    """
    if model == "default":
        path = default_model_path()
        return str(path), path.name
    folder = model_folder(model)
    if folder is not None:
        return str(folder), folder.name
    return model, model


def load_model(config: EngineConfig, slot: int = 0) -> LoadedModel:
    """Load weights and tokenizer. Raises `UserError` in one line where that is not possible."""
    device = resolve_device(config.device, slot)
    source, name = resolve_model(config.model)
    dtype: torch.dtype = getattr(torch, config.dtype)
    try:
        model_config = AutoConfig.from_pretrained(source)
        if getattr(model_config, "is_encoder_decoder", False):
            raise UserError(f"model: {name!r} is an encoder-decoder; the engine runs decoder-only causal models")
        tokenizer = _load_tokenizer(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except UserError:
        raise
    except Exception as error:  # the library and the readers of its file formats raise errors of every kind
        reason = " ".join(str(error).split())[:300]
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise UserError(f"model: cannot load {config.model!r}{offline}: {reason}") from error
    model, loading = loaded
    if loading["missing_keys"]:
        # The library fills them with random numbers and only warns.
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise UserError(f"model: the weights of {name!r} are incomplete: {missing} missing; save the model again")
    model = model.to(device).eval().requires_grad_(False)
    text_config = model.config.get_text_config()
    own_limit = getattr(text_config, "max_position_embeddings", None) or config.max_model_len
    eos = model.generation_config.eos_token_id if model.generation_config.eos_token_id is not None else ()
    eos_token_ids = frozenset([eos] if isinstance(eos, int) else eos)
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
        identity=ModelIdentity(_weights_digest(model), _tokenizer_digest(tokenizer), _settings(text_config)),
        max_len=min(config.max_model_len, own_limit),
        eos_token_ids=eos_token_ids,
        generation=generation,
    )


def _load_tokenizer(source: str) -> Any:
    declared = get_tokenizer_config(source).get("tokenizer_class")
    # A generic tokenizer is whole in tokenizer.json. For some architectures (Qwen2) AutoTokenizer would put their usual
    # normalisation and special tokens in the place of what was saved.
    loader: Any = PreTrainedTokenizerFast if declared == "TokenizersBackend" else AutoTokenizer
    tokenizer = loader.from_pretrained(source)
    # Where the files are missing, the library makes one without a vocabulary and says nothing.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"model: there is no tokenizer in {source!r}; save one beside the weights")
    return tokenizer


def _weights_digest(model: torch.nn.Module) -> str:
    """Digest of the weights as loaded: whatever file, revision or conversion they came from, equal weights agree."""
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
    """All that the configuration says of how the weights are used: positions (rope), activation, norms, ..."""
    settings = config.to_dict()
    used = {name: settings[name] for name in settings if name not in _NOT_COMPUTED_WITH and not name.startswith("_")}
    return json.dumps(used, sort_keys=True, default=str)

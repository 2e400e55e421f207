"""Helpers for tests of the engine: tiny models, a cache in memory, and the plain answer to compare with."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import transformers

from cache.protocol import ChunkShape, KVCache, Prefetch
from core.clock import Clock, ManualClock
from core.records import Request
from inference_service.byte_tokenizer import byte_tokenizer
from inference_service.completion import Completion, Failure
from inference_service.config import EngineConfig
from inference_service.continuous_engine import ContinuousEngine
from inference_service.model import LoadedModel
from inference_service.transformers_engine import load_checked_model

CHUNK = 8
MAX_LEN = 64
EOS_ID, PAD_ID = 256, 257
LAYERS_OF_TWO: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Far above the usual 0.02, so that attention and positions show in every answer.
    "initializer_range": 0.2,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "bos_token_id": None,
}
GPT2: dict[str, Any] = {
    "vocab_size": 258,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "initializer_range": 0.2,
    "eos_token_id": EOS_ID,
    "bos_token_id": None,
}


def save_tiny(path: Path, config: Any, *, seed: int = 0) -> Path:
    """Save a model of `config` with random weights and the byte tokenizer to `path`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.is_encoder_decoder:
            model = transformers.AutoModelForSeq2SeqLM.from_config(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def load_tiny(path: Path, *, max_model_len: int = MAX_LEN) -> LoadedModel:
    return load_checked_model(EngineConfig(model=str(path), device="cpu", max_model_len=max_model_len))


def tokens_of(seed: int, count: int) -> tuple[int, ...]:
    """Random bytes as prompt tokens. Prompts of different seeds have different first chunks."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 256, (count,), generator=generator).tolist())


def ask(request_id: str, tokens: Sequence[int], max_new_tokens: int = 6, **fields: Any) -> Request:
    return Request(
        request_id=request_id,
        session_id="s",
        user_id="u",
        max_new_tokens=max_new_tokens,
        created_at_ms=fields.pop("created_at_ms", 0.0),
        prompt_token_ids=tuple(tokens),
        **fields,
    )


def make_engine(
    model: LoadedModel,
    *,
    cache: KVCache | None = None,
    max_running: int = 4,
    clock: Clock | None = None,
    on_begin: Callable[[Sequence[Request]], None] = lambda requests: None,
    on_pass: Callable[[], None] = lambda: None,
    **settings: Any,
) -> ContinuousEngine:
    config = EngineConfig(max_running=max_running, max_model_len=MAX_LEN, **settings)
    return ContinuousEngine(model, config, cache, CHUNK, clock or ManualClock(), on_begin=on_begin, on_pass=on_pass)


def answers(done: Iterable[Completion | Failure]) -> dict[str, Completion]:
    """Completions by request. A failure fails the test."""
    found = {}
    for one in done:
        assert isinstance(one, Completion), one
        assert one.prompt_tokens == one.local_tokens + one.remote_tokens + one.computed_tokens
        found[one.request.request_id] = one
    return found


_plain: dict[tuple[int, tuple[int, ...], int], tuple[int, ...]] = {}


def plain_answer(model: LoadedModel, prompt: Sequence[int], max_new_tokens: int) -> tuple[int, ...]:
    """The answer of `generate` of `transformers` to this prompt alone, cut before the end token."""
    wanted = min(max_new_tokens, model.max_len - len(prompt))
    key = (id(model), tuple(prompt), wanted)
    if key not in _plain:
        ids = torch.tensor([list(prompt)])
        made = model.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=wanted,
            pad_token_id=PAD_ID,
        )[0, len(prompt) :].tolist()
        end = next((index for index, token in enumerate(made) if token in model.eos_token_ids), len(made))
        _plain[key] = tuple(made[:end])
    return _plain[key]


class MemoryPrefix:
    """A prefix whose chunks become NaN on release, so that a later read is noticed."""

    def __init__(self, cache: "MemoryCache", chunks: list[torch.Tensor], tiers: list[str]) -> None:
        self._cache = cache
        self.chunks = chunks
        self.tiers = tiers
        self.local_chunks = tiers.count("local")
        self.remote_chunks = tiers.count("remote")
        self.capacity_chunks = cache.capacity_chunks
        self.used_chunks = cache.used_chunks
        self._held = True
        cache.open_prefixes += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        if self._held:
            self._held = False
            self._cache.open_prefixes -= 1
            for chunk in self.chunks:
                chunk.fill_(float("nan"))


class Coming:
    """A prefetch that the test ends. `waits` counts how often an engine waited for it."""

    def __init__(self) -> None:
        self.ready = False
        self.cancelled = False
        self.waits = 0

    def wait(self, timeout_s: float) -> None:
        self.waits += 1

    def cancel(self) -> None:
        self.cancelled = True


class MemoryCache:
    """A `KVCache` in a dictionary. `place(i)` gives the tier of chunk `i`: `local`, `remote` or `gone`."""

    capacity_chunks = 1000

    def __init__(self, shape: ChunkShape, place: Callable[[int], str] = lambda index: "local") -> None:
        self.shape = shape
        self.place = place
        self.open_prefixes = 0
        self.stored: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self.costs: list[float | None] = []
        """What the engine knew of the cost of a prefill, at each prefetch."""
        self.coming: dict[tuple[int, ...], Coming] = {}
        """Prompts of which chunks are on their way."""
        self.taken: list[Coming] = []
        self.refuses: set[tuple[int, ...]] = set()
        """Prompts at which a look-up raises."""
        self.closed = False

    @property
    def used_chunks(self) -> int:
        return len(self.stored)

    def prefetch(
        self, token_ids: Sequence[int], salt: str = "", prefill_ms_per_token: float | None = None, priority: int = 0
    ) -> Coming | None:
        self.costs.append(prefill_ms_per_token)
        return self.coming.get(tuple(token_ids))

    def lookup(self, token_ids: Sequence[int], salt: str = "", prefetch: Prefetch | None = None) -> MemoryPrefix:
        if isinstance(prefetch, Coming):
            self.taken.append(prefetch)
        if tuple(token_ids) in self.refuses:
            raise RuntimeError("the cache is broken")
        chunks: list[torch.Tensor] = []
        tiers: list[str] = []
        for index, key in enumerate(self._keys(token_ids, salt)):
            tier = self.place(index)
            if key not in self.stored or tier == "gone":
                break
            chunks.append(self.stored[key].clone())
            tiers.append(tier)
        return MemoryPrefix(self, chunks, tiers)

    def store(self, token_ids: Sequence[int], read_chunk: Callable[[int, torch.Tensor], None], salt: str = "") -> int:
        kept = 0
        for index, key in enumerate(self._keys(token_ids, salt)):
            if key not in self.stored:
                out = torch.full(self.shape.size, float("nan"), dtype=self.shape.dtype)
                read_chunk(index, out)
                assert bool(out.isfinite().all())
                self.stored[key] = out
                kept += 1
        return kept

    def close(self, timeout_s: float = 5.0) -> None:
        self.closed = True

    def _keys(self, token_ids: Sequence[int], salt: str) -> list[tuple[str, tuple[int, ...]]]:
        tokens = self.shape.chunk_tokens
        return [(salt, tuple(token_ids[: end + tokens])) for end in range(0, len(token_ids) - tokens + 1, tokens)]

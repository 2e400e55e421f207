"""Measures one prompt in each way to answer it, and checks that each answer was made in that way."""

import time
from collections.abc import Callable, Sequence
from uuid import uuid4

import torch

from benchmarks.raw_redis import RawReader
from cache.codec import record_bytes
from cache.config import CacheConfig, RemoteConfig, SizingConfig
from cache.keys import KeySchema
from cache.manager import TwoLevelCache, open_cache
from cache.protocol import CachedPrefix, Prefetch
from core.errors import UserError
from core.records import Request
from inference_service.active_sequence import Piece
from inference_service.completion import Completion
from inference_service.config import EngineConfig
from inference_service.continuous_engine import ContinuousEngine
from inference_service.kv_pool import KVPool
from inference_service.model import LoadedModel
from inference_service.runner import Runner

FLUSH_TIMEOUT_S = 60.0

TTFTS = ("recompute", "local", "redis")
"""The three ways to a first token, in the order of each round."""


class WrongMeasurementError(Exception):
    """A measurement is not what its name says."""


class SteadyClock:
    """Takes both times from one clock that never jumps and has the finest resolution."""

    def wall_ms(self) -> float:
        return time.perf_counter_ns() / 1e6

    def monotonic_ms(self) -> float:
        return time.perf_counter_ns() / 1e6


class ColdCache:
    """A `KVCache` whose local tier can be emptied: a new cache replaces the old one."""

    def __init__(self, make: Callable[[], TwoLevelCache]) -> None:
        self._make = make
        self.current = make()
        self.shape = self.current.shape

    def start_cold(self, primer: Sequence[int]) -> None:
        """Open a new, empty cache, and open its connection by looking up one chunk that Redis has."""
        self.current.close()
        self.current = self._make()
        with self.current.fetch_and_lookup(primer) as prefix:
            _require(prefix.remote_chunks == 1, "the primer did not come from Redis")

    def prefetch(
        self, token_ids: Sequence[int], salt: str = "", prefill_ms_per_token: float | None = None, priority: int = 0
    ) -> Prefetch | None:
        return self.current.prefetch(token_ids, salt, prefill_ms_per_token, priority)

    def lookup(self, token_ids: Sequence[int], salt: str = "", prefetch: Prefetch | None = None) -> CachedPrefix:
        return self.current.lookup(token_ids, salt, prefetch)

    def store(self, token_ids: Sequence[int], read_chunk: Callable[[int, torch.Tensor], None], salt: str = "") -> int:
        return self.current.store(token_ids, read_chunk, salt)

    def close(self, timeout_s: float = 5.0) -> None:
        self.current.close(timeout_s)


class ReuseProbe:
    """One model with one engine for each way to answer, all on the same Redis. Each call is one measurement."""

    def __init__(
        self, model: LoadedModel, config: EngineConfig, redis_url: str, longest_tokens: int, seed: int
    ) -> None:
        """`longest_tokens` is the length of the longest sequence; `seed` is the random seed of the prompts."""
        self.model = model
        self._config = config
        defaults = CacheConfig()
        self.chunk_tokens = defaults.chunk_tokens
        self.shape = model.chunk_shape(self.chunk_tokens)
        self.settings = defaults.model_copy(
            update={
                # The cache holds the longest prompt and the primer, and a busy machine cannot cut a lookup short.
                "sizing": SizingConfig(
                    capacity_chunks=max(longest_tokens // self.chunk_tokens + 2, defaults.sizing.capacity_chunks)
                ),
                "remote": RemoteConfig(
                    redis_url=redis_url, redis_namespace=f"kv-reuse-{uuid4().hex[:8]}", remote_deadline_ms=10_000
                ),
            }
        )
        self._clock = SteadyClock()
        self._tokens = torch.Generator().manual_seed(seed)
        self._keys = KeySchema(model.identity, self.shape)
        self._raw = RawReader(redis_url)
        self._pool = KVPool(self.shape, 1, model.max_len, model.device)
        self._runner = Runner(model, self._pool)
        self._warm = self._new_cache()
        self._cold = ColdCache(self._new_cache)
        self._off = self._engine(None)
        self._local = self._engine(self._warm)
        self._remote = self._engine(self._cold)
        self._primer = self._prompt(self.chunk_tokens)
        self._complete(self._local, self._primer, 1)
        self._flush()

    def close(self) -> None:
        self._raw.close()
        self._local.close()
        self._remote.close()

    def ttft_round(self, length: int) -> dict[str, float]:
        """Milliseconds of one new prompt of `length` tokens: one pass, recomputed, local, Redis, Redis' lower bound."""
        prompt = self._prompt(length)
        self._check(self._complete(self._local, prompt, 1), computed=length)
        self._flush()
        self._cold.start_cold(self._primer)
        read_before = self._cold.current.stats().bytes_read

        unbroken_ms, unbroken = self._pass(prompt, 0)
        recomputed = self._check(self._complete(self._off, prompt, 1), computed=length)
        local = self._check(self._complete(self._local, prompt, 1), local=length - 1)
        remote = self._check(self._complete(self._remote, prompt, 1), remote=length - 1)
        transfer_ms, prefill_ms, token = self._floor(prompt)

        _require(
            recomputed.token_ids == local.token_ids == remote.token_ids == (token,) == (unbroken,), "the answers differ"
        )
        stats = self._cold.current.stats()
        _require(stats.bytes_read - read_before == self.moved_bytes(length), "Redis moved another number of bytes")
        _require(stats.remote_errors + stats.remote_timeouts + stats.remote_corrupt == 0, "Redis had faults")
        done = dict(zip(TTFTS, (recomputed, local, remote), strict=True))
        taken = {f"{name}_ttft_ms_{length}": _ttft_ms(completion) for name, completion in done.items()}
        taken |= {f"floor_transfer_ms_{length}": transfer_ms, f"floor_prefill_ms_{length}": prefill_ms}
        return taken | {f"unbroken_ms_{length}": unbroken_ms}

    def unique_pair(self, prompt_tokens: int, output_tokens: int, cache_first: bool) -> dict[str, float]:
        """Milliseconds of one whole request with a new prompt, without and with the cache, in the given order."""
        prompt = self._prompt(prompt_tokens)
        answers: dict[str, tuple[int, ...]] = {}
        taken: dict[str, float] = {}
        before = self._warm.stats()
        for name in ("on", "off") if cache_first else ("off", "on"):
            began_s = time.perf_counter()
            completion = self._complete(self._local if name == "on" else self._off, prompt, output_tokens)
            if name == "on":
                self._flush()
            taken[f"unique_{name}_ms"] = (time.perf_counter() - began_s) * 1000
            answers[name] = self._check(completion, computed=len(prompt)).token_ids
        _require(answers["on"] == answers["off"], "the answers differ")
        _require(len(answers["on"]) == output_tokens, "the answer is too short")
        after = self._warm.stats()
        written = self.moved_bytes(held_tokens(prompt_tokens, output_tokens))
        _require(after.bytes_written - before.bytes_written == written, "not every chunk was written")
        return taken

    def moved_bytes(self, tokens: int) -> int:
        """Bytes of the records of all full chunks of `tokens` tokens."""
        return tokens // self.chunk_tokens * record_bytes(self.shape)

    def _floor(self, prompt: list[int]) -> tuple[float, float, int]:
        """Transfer of the prompt's records and prefill of its last token, both in ms, and the token it gives."""
        namespace = self.settings.remote.redis_namespace
        keys = [f"{namespace}:{chunk_hash.hex()}".encode() for chunk_hash in self._keys.of(prompt).hashes]
        transfer_ms = self._raw.read_ms(keys, record_bytes(self.shape))
        with self._warm.lookup(prompt) as prefix:
            for index, chunk in enumerate(prefix.chunks):
                self._pool.load_chunk(0, index, chunk)
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)
        return transfer_ms, *self._pass(prompt, len(prompt) - 1)

    def _pass(self, prompt: list[int], start: int) -> tuple[float, int]:
        """Time in ms of one pass over the prompt from `start` on, and the token it gives."""
        began_s = time.perf_counter()
        token = int(self._runner.forward([Piece(0, start, prompt[start:])]).argmax())
        return (time.perf_counter() - began_s) * 1000, token

    def _new_cache(self) -> TwoLevelCache:
        return open_cache(self.settings, self.shape, self.model.identity, self._clock)

    def _engine(self, cache: TwoLevelCache | ColdCache | None) -> ContinuousEngine:
        engine = ContinuousEngine(self.model, self._config, cache, self.chunk_tokens, self._clock)
        engine.warm_up()
        return engine

    def _prompt(self, tokens: int) -> list[int]:
        drawn: list[int] = torch.randint(0, self.model.vocab_size, (tokens,), generator=self._tokens).tolist()
        return drawn

    def _complete(self, engine: ContinuousEngine, prompt: list[int], max_new_tokens: int) -> Completion:
        request = Request(
            request_id="benchmark",
            session_id="benchmark",
            user_id="benchmark",
            max_new_tokens=max_new_tokens,
            created_at_ms=0.0,
            prompt_token_ids=tuple(prompt),
        )
        (done,) = engine.run([request])
        if not isinstance(done, Completion):
            raise UserError(f"the engine refused a request: {done.reason}")
        return done

    def _check(self, done: Completion, *, local: int = 0, remote: int = 0, computed: int = 1) -> Completion:
        found = (done.local_tokens, done.remote_tokens, done.computed_tokens)
        wanted = (local, remote, computed)
        _require(found == wanted, f"local, remote and computed tokens are {found} instead of {wanted}")
        return done

    def _flush(self) -> None:
        _require(self._warm.flush(FLUSH_TIMEOUT_S), "Redis did not take all chunks in time")
        _require(self._warm.stats().write_dropped == 0, "chunks were dropped on their way to Redis")


def held_tokens(prompt_tokens: int, output_tokens: int) -> int:
    """Number of tokens with keys and values at the end: an answer's last token never runs through the model."""
    return prompt_tokens + output_tokens - 1


def _ttft_ms(done: Completion) -> float:
    _require(done.first_token_ms is not None, "no token came")
    return (done.first_token_ms or 0.0) - done.arrived_ms


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise WrongMeasurementError(otherwise)

"""The step loop: requests enter, are prefilled one by one over what the cache has, decode together, and leave.

Prefill is bound by computation and decode by memory bandwidth (Orca, OSDI 2022; Sarathi-Serve, OSDI 2024): a step
prefills what waits while there is room, each prompt alone and only its part that is not reused, then decodes one token
of every running sequence together. Sequences enter and leave between steps.
"""

import heapq
import itertools
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from cache.protocol import KVCache
from core.clock import Clock
from core.config import EngineConfig
from core.errors import UserError
from core.records import FinishReason, Request
from inference_service.kv_pool import KVPool
from inference_service.model import LoadedModel, load_model
from inference_service.prompts import prompt_tokens
from inference_service.runner import Runner
from inference_service.sampling import Sampler
from inference_service.support import check_supported

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Completion:
    """An answered request, with what the engine counted and timed. Times are of the engine's clock."""

    request: Request
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    local_tokens: int
    remote_tokens: int
    computed_tokens: int
    decode_steps: int
    """Tokens after the first one, an end-of-sequence token included."""
    cache_capacity_chunks: int
    cache_used_chunks: int
    arrived_ms: float
    began_ms: float
    first_token_ms: float | None
    finished_ms: float


@dataclass(frozen=True)
class Failure:
    """A request that could not be answered, and why."""

    request: Request
    reason: str


@dataclass
class _Sequence:
    request: Request
    prompt: list[int]
    sampler: Sampler
    arrived_ms: float
    expires_ms: float | None
    began_ms: float = 0.0
    first_token_ms: float | None = None
    local_tokens: int = 0
    remote_tokens: int = 0
    capacity_chunks: int = 0
    used_chunks: int = 0
    output: list[int] = field(default_factory=list)
    held: int = 0
    """Tokens whose key/value stand in the sequence's row: all but the last sampled one."""

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output


class Engine:
    """One model, one pool of rows, one cache. Single-threaded: call everything from one thread."""

    def __init__(
        self, model: LoadedModel, config: EngineConfig, cache: KVCache | None, chunk_tokens: int, clock: Clock
    ) -> None:
        self.model = model
        self.chunk_shape = model.chunk_shape(chunk_tokens)
        self._cache = cache
        self._clock = clock
        self._pool = KVPool(self.chunk_shape, config.max_running, model.max_len, model.device)
        self._runner = Runner(model, self._pool)
        self._waiting: list[tuple[int, int, _Sequence]] = []
        self._arrivals = itertools.count()
        self._running: list[_Sequence] = []
        """The sequence at index i owns row i of the pool."""
        self._prefill_ms_per_token: float | None = None

    @property
    def unfinished(self) -> int:
        return len(self._waiting) + len(self._running)

    def submit(self, request: Request, arrived_ms: float) -> None:
        """Queue a request; a higher `priority` goes first, then who came first.

        `arrived_ms`: wall time of its arrival. Raises `UserError` for a request that this model cannot answer.
        """
        prompt = prompt_tokens(request, self.model)
        expires_ms = None if request.deadline_ms is None else request.created_at_ms + request.deadline_ms
        sequence = _Sequence(request, prompt, Sampler(request), arrived_ms, expires_ms)
        heapq.heappush(self._waiting, (-request.priority, next(self._arrivals), sequence))

    def step(self) -> list[Completion | Failure]:
        """Prefill what waits, as far as rows are free; decode one token of all that runs; what has finished."""
        done: list[Completion | Failure] = []
        while self._waiting and len(self._running) < self._pool.rows:
            sequence = heapq.heappop(self._waiting)[2]
            try:
                done += self._admit(sequence)
            except Exception as error:  # one failing request fails alone; the others' rows are untouched
                done.append(Failure(sequence.request, f"prefill failed: {type(error).__name__}: {error}"))
        if self._running:
            self._decode()
            done += self._leave()
        return done

    def run(self, requests: Iterable[Request]) -> list[Completion | Failure]:
        """Answer a closed group; in the order in which they finish."""
        done: list[Completion | Failure] = []
        for request in requests:
            try:
                self.submit(request, self._clock.wall_ms())
            except UserError as error:
                done.append(Failure(request, str(error)))
        while self.unfinished:
            done += self.step()
        return done

    def warm_up(self) -> None:
        """Run each kind of forward pass once, in an idle engine: first calls allocate and choose kernels."""
        prompt = [0] * min(self.chunk_shape.chunk_tokens, self.model.max_len - 1)
        for row in range(self._pool.rows):
            self._runner.prefill(row, prompt, 0)
        self._runner.decode([0] * self._pool.rows, [len(prompt)] * self._pool.rows)

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()

    def _admit(self, sequence: _Sequence) -> list[Completion | Failure]:
        """Prefill one sequence into the next free row; it stays there unless its first token is its last."""
        sequence.began_ms = self._clock.wall_ms()
        if self._expired(sequence):
            return [self._complete(sequence, FinishReason.DEADLINE)]
        row = len(self._running)
        reused = self._reuse(sequence, row)
        began_ms = self._clock.monotonic_ms()
        logits = self._runner.prefill(row, sequence.prompt[reused:], reused)
        token = sequence.sampler.sample(logits)
        self._learn_prefill_cost(len(sequence.prompt) - reused, self._clock.monotonic_ms() - began_ms)
        sequence.held = len(sequence.prompt)
        sequence.first_token_ms = self._clock.wall_ms()
        sequence.output.append(token)
        self._store(sequence, row)
        reason = self._finish_reason(sequence)
        if reason is not None:
            return [self._complete(sequence, reason)]
        self._running.append(sequence)
        return []

    def _reuse(self, sequence: _Sequence, row: int) -> int:
        """Fill the row from the cache; the number of prompt tokens that need no computing."""
        if self._cache is None:
            return 0
        tokens = self.chunk_shape.chunk_tokens
        with self._cache.lookup(sequence.prompt, sequence.request.cache_salt, self._prefill_ms_per_token) as lease:
            sequence.capacity_chunks, sequence.used_chunks = lease.capacity_chunks, lease.used_chunks
            # The last prompt token is always computed: its logits are the first answer token's. Where the chunks
            # reach the very end, the last one counts one token less.
            limit = len(sequence.prompt) - 1
            for index, (chunk, source) in enumerate(zip(lease.chunks, lease.sources, strict=True)):
                self._pool.load_chunk(row, index, chunk)
                counted = min(tokens, limit - index * tokens)
                if source == "local":
                    sequence.local_tokens += counted
                else:
                    sequence.remote_tokens += counted
            if self.model.device.type == "cuda":
                # The copies may still be under way, and the lease's memory may be reused once it is released.
                torch.cuda.synchronize(self.model.device)
        return sequence.local_tokens + sequence.remote_tokens

    def _store(self, sequence: _Sequence, row: int) -> None:
        """Keep the row's full chunks. A store that fails is a miss later, and no fault of the request."""
        if self._cache is None:
            return
        try:
            self._cache.store(
                sequence.tokens[: sequence.held],
                lambda index, out: self._pool.read_chunk(row, index, out),
                sequence.request.cache_salt,
            )
        except Exception:
            logger.exception("chunks of request %r could not be stored", sequence.request.request_id)

    def _decode(self) -> None:
        running = self._running
        logits = self._runner.decode([sequence.output[-1] for sequence in running], [s.held for s in running])
        greedy = logits.argmax(dim=-1).tolist()
        for row, sequence in enumerate(running):
            sequence.held += 1
            sequence.output.append(greedy[row] if sequence.sampler.greedy else sequence.sampler.sample(logits[row]))

    def _leave(self) -> list[Completion | Failure]:
        """Take out what has finished; the last row moves into each gap."""
        done: list[Completion | Failure] = []
        for row in reversed(range(len(self._running))):
            sequence = self._running[row]
            reason = self._finish_reason(sequence)
            if reason is None:
                continue
            try:
                done.append(self._complete(sequence, reason))
            except Exception as error:  # one answer that cannot be written as text fails alone
                done.append(Failure(sequence.request, f"answer: {type(error).__name__}: {error}"))
            if sequence.held // self.chunk_shape.chunk_tokens > len(sequence.prompt) // self.chunk_shape.chunk_tokens:
                self._store(sequence, row)
            last = self._running.pop()
            if last is not sequence:
                self._pool.move_row(len(self._running), row, last.held)
                self._running[row] = last
        return done

    def _finish_reason(self, sequence: _Sequence) -> FinishReason | None:
        if sequence.output[-1] in self.model.eos_token_ids:
            return FinishReason.STOP
        if len(sequence.output) >= sequence.request.max_new_tokens:
            return FinishReason.LENGTH
        if len(sequence.prompt) + len(sequence.output) >= self.model.max_len:
            return FinishReason.CONTEXT
        return FinishReason.DEADLINE if self._expired(sequence) else None

    def _expired(self, sequence: _Sequence) -> bool:
        return sequence.expires_ms is not None and self._clock.wall_ms() >= sequence.expires_ms

    def _complete(self, sequence: _Sequence, reason: FinishReason) -> Completion:
        answer = sequence.output[:-1] if reason is FinishReason.STOP else sequence.output
        prompt = len(sequence.prompt)
        return Completion(
            request=sequence.request,
            text=self.model.tokenizer.decode(answer, skip_special_tokens=True),
            token_ids=tuple(answer),
            finish_reason=reason,
            prompt_tokens=prompt,
            local_tokens=sequence.local_tokens,
            remote_tokens=sequence.remote_tokens,
            computed_tokens=prompt - sequence.local_tokens - sequence.remote_tokens,
            decode_steps=max(0, len(sequence.output) - 1),
            cache_capacity_chunks=sequence.capacity_chunks,
            cache_used_chunks=sequence.used_chunks,
            arrived_ms=sequence.arrived_ms,
            began_ms=sequence.began_ms,
            first_token_ms=sequence.first_token_ms,
            finished_ms=self._clock.wall_ms(),
        )

    def _learn_prefill_cost(self, tokens: int, took_ms: float) -> None:
        """Online average over long prefills; a short one is mostly the fixed cost of a step."""
        if tokens >= self.chunk_shape.chunk_tokens:
            cost = took_ms / tokens
            average = self._prefill_ms_per_token
            self._prefill_ms_per_token = cost if average is None else 0.8 * average + 0.2 * cost


def load_checked_model(config: EngineConfig, slot: int = 0) -> LoadedModel:
    """A loaded model that the pool is known to run as the model alone would. Raises `UserError`."""
    model = load_model(config, slot)
    check_supported(model)
    return model

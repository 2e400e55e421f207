"""The step loop: requests enter, are prefilled over what the cache has, decode together, and leave.

Prefill is bound by computation and decode by memory bandwidth, so one forward pass takes both: a token of every running
sequence, and pieces of prompts. Sequences enter and leave between steps, so that no long prompt or answer holds others.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch

from cache.protocol import KVCache
from core.clock import Clock
from core.errors import UserError
from core.records import FinishReason, Request
from inference_service.active_sequence import ActiveRequest, ActiveSequence, Piece
from inference_service.answer import completion_of, finish_reason, tell_token
from inference_service.completion import Completion, Failure, combined, timed_out
from inference_service.config import EngineConfig
from inference_service.detokenize import StopStrings, TextStream
from inference_service.engine import EngineInfo, TokenListener
from inference_service.forward import ForwardPass, NotFiniteError, Outcome
from inference_service.prefix_reuse import PrefixReuse
from inference_service.prompts import end_tokens_of, grammar_of, prompt_tokens
from inference_service.protocol import ServedModel
from inference_service.rows import RowTable
from inference_service.scheduler import MOST_PASS_TOKENS, Limits, Scheduler
from inference_service.sequence_sampler import SequenceSampler
from inference_service.stats import EngineStats

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.005
"""Longest that a step waits for Redis where nothing runs."""


class ContinuousEngine:
    """An `Engine` with continuous batching: one model, rows to run sequences in, one cache."""

    def __init__(
        self,
        model: ServedModel,
        config: EngineConfig,
        cache: KVCache | None,
        chunk_tokens: int,
        clock: Clock,
        *,
        name: str = "transformers",
        on_begin: Callable[[Sequence[Request]], None] = lambda requests: None,
        on_pass: Callable[[], None] = lambda: None,
    ) -> None:
        """`name`: as in `EngineInfo`. `on_begin` and `on_pass`: as in `EngineSetting`."""
        self.model = model
        self.chunk_shape = model.chunk_shape(chunk_tokens)
        self._name = name
        self._clock = clock
        self._on_begin = on_begin
        self._timeout_ms = config.request_timeout_ms or math.inf
        self._runner = model.make_runner(config.max_running, chunk_tokens)
        self._rows = RowTable(self._runner.pool, self._runner.rows)
        self._reuse = None
        if cache is not None:
            self._reuse = PrefixReuse(cache, self._runner.pool, chunk_tokens, model.wait_for_device)
        limits = Limits(
            running_tokens=config.max_running_tokens or config.max_running * model.max_len,
            step_tokens=config.step_prefill_tokens or math.inf,
            piece_ms=config.step_prefill_ms or math.inf,
            chunk_tokens=chunk_tokens,
            reuses=cache is not None,
        )
        self._warm_up_tokens = int(min(limits.step_tokens, MOST_PASS_TOKENS))
        self._scheduler = Scheduler(self._rows, limits)
        self._requests: set[ActiveRequest] = set()
        self._unannounced: list[Request] = []
        """Requests that begin in this step, and that `on_begin` has not been told of."""
        self._done: list[Completion | Failure] = []
        """Requests that have finished in this step."""
        self._counted = EngineStats()
        self._forward = ForwardPass(self._runner, clock, self._counted, on_pass)

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            engine=self._name,
            model=self.model.name,
            device=str(self.model.device),
            dtype=str(self.chunk_shape.dtype).removeprefix("torch."),
            chunk_bytes=self.chunk_shape.size_bytes,
        )

    @property
    def unfinished(self) -> int:
        return len(self._requests)

    @property
    def stats(self) -> EngineStats:
        return replace(
            self._counted,
            waiting=self._scheduler.waiting,
            prefilling=len(self._rows.prefilling),
            running=len(self._rows.running),
        )

    @property
    def waiting_since_ms(self) -> float | None:
        return self._scheduler.waiting_since_ms

    def submit(self, request: Request, arrived_ms: float, on_token: TokenListener | None = None) -> None:
        """Queue a request. A higher `priority` goes first, then the earlier arrival.

        The first choice of a request computes the prompt; the others are queued after that.
        """
        prompt = prompt_tokens(request, self.model)
        expires_ms = math.inf if request.deadline_ms is None else request.created_at_ms + request.deadline_ms
        weight = min(len(prompt) + request.max_new_tokens, self.model.max_len)
        sampling, rules = self.model.generation.of(request), self.model.generation.rules
        end_tokens = end_tokens_of(request, sampling, rules, self.model)
        stop = StopStrings(request.stop, self.model.tokenizer, sampling.min_new_tokens) if request.stop else None
        times_out_ms = arrived_ms + self._timeout_ms
        parent = ActiveRequest(request, on_token)
        for choice in range(request.n):
            sampler = SequenceSampler(
                sampling,
                rules,
                prompt=prompt,
                most_tokens=weight - len(prompt),
                end_tokens=end_tokens,
                choice=choice,
                grammar=grammar_of(request, self.model),
            )
            sequence = ActiveSequence(
                parent, prompt, sampler, arrived_ms, expires_ms, times_out_ms, weight, stop=stop, choice=choice
            )
            if on_token is not None:
                sequence.stream = TextStream(self.model.tokenizer, prompt, request.stop or ())
            parent.sequences.append(sequence)
        first = parent.sequences[0]
        if self._reuse is not None and first.reuses:
            self._reuse.prefetch(first, self._scheduler.prefill_ms_per_token)
        self._requests.add(parent)
        self._scheduler.add(first)

    def cancel(self, request: Request) -> bool:
        parent = next((one for one in self._requests if one.request is request), None)
        if parent is None:
            return False
        self._let_go(parent)
        return True

    def step(self) -> list[Completion | Failure]:
        """One token of all that runs, and pieces of prompts within the step's budget."""
        began_ms = self._clock.monotonic_ms()
        self._expire()
        plan = self._scheduler.plan(self._begin)
        if not (plan.passes[0] or plan.timed or self._done or self._rows.running):
            self._await_prefetch()
        running = tuple(self._rows.running)
        for pieces in plan.passes:
            self._compute(running, [sequence for sequence in pieces if not sequence.left])
            running = ()
        for sequence in plan.timed:
            self._compute_timed(sequence)
        self._leave()
        self._scheduler.end_step(self._clock.monotonic_ms() - began_ms)
        done, self._done = self._done, []
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
        """Run each kind of forward pass once: first calls allocate and choose kernels.

        The prompts together are no more than a step may compute, so that memory is not taken for a pass of a size that
        never comes.
        """
        prompt = [0] * min(self.chunk_shape.chunk_tokens, self.model.max_len - 1, self._warm_up_tokens)
        prompts = min(self._rows.count, self._warm_up_tokens // len(prompt))
        self._runner.forward([Piece(row, 0, prompt) for row in range(prompts)])
        self._runner.forward([Piece(row, len(prompt), [0]) for row in range(self._rows.count)])
        for row in range(self._rows.count):
            self._runner.pool.clear(row, 0, len(prompt) + 1)

    def close(self) -> None:
        for parent in self._requests:
            for sequence in parent.sequences:
                _drop_prefetch(sequence)
        if self._reuse is not None:
            self._reuse.close()

    # Begin.

    def _expire(self) -> None:
        """Let go of requests whose time is over before their first token: waiting for a row must not hide it."""
        now_ms = self._clock.wall_ms()
        for sequence in self._scheduler.take_late(now_ms):
            if sequence.left:
                continue
            if now_ms < sequence.expires_ms:
                self._fail(sequence, self._timeout(sequence))
                continue
            # Where the first choice did not get to compute the prompt, none of the others can begin.
            ended = sequence.parent.sequences if sequence.leader is None else [sequence]
            self._take_out(*ended)
            for one in ended:
                if one.row < 0:
                    one.began_ms = now_ms
                self._finish(one, FinishReason.DEADLINE)

    def _begin(self, sequence: ActiveSequence) -> bool:
        """Fill the row of a sequence with what the cache has; false if that failed."""
        logger.debug("request %r begins", sequence.request.request_id)
        if sequence.leader is None:
            self._unannounced.append(sequence.request)
        sequence.began_ms = self._clock.wall_ms()
        try:
            held = self._rows.copy_prompt(sequence)
            if not held and self._reuse is not None and sequence.reuses:
                self._announce()
                held = self._reuse.load(sequence)
                self._counted.local_tokens += sequence.local_tokens
                self._counted.remote_tokens += sequence.remote_tokens
        except torch.AcceleratorError:
            raise
        except Exception as error:  # one failing request fails alone; the others' rows are untouched
            self._fail(sequence, self._reason("cache", error))
            return False
        # Chunks are finite: none is stored, or taken from Redis, without a check.
        sequence.held = sequence.finite = sequence.touched = held
        return True

    def _announce(self) -> None:
        """Tell which requests are about to begin: if the process dies of one, it is known which it may have been."""
        if self._unannounced:
            requests, self._unannounced = self._unannounced, []
            self._on_begin(requests)

    def _await_prefetch(self) -> None:
        """Wait for the chunks of the first request of the queue, where nothing runs.

        For a short time, so that a request that comes meanwhile is taken in soon.
        """
        first = self._scheduler.first
        if first is not None and first.prefetch is not None:
            first.prefetch.wait(IDLE_WAIT_S)

    # Compute.

    def _compute(self, running: Sequence[ActiveSequence], chosen: Sequence[ActiveSequence]) -> None:
        """A pass over what runs and the pieces of those chosen."""
        if not running and not chosen:
            return
        began_ms = self._clock.monotonic_ms()
        self._announce()
        outcomes = self._forward.run([*running, *chosen])
        tokens = sum(sequence.piece_tokens for sequence in chosen)
        # The logits of scored tokens cost more than the tokens.
        if not any(sequence.is_scored for sequence in chosen):
            self._scheduler.learn_pass(len(running), tokens, self._clock.monotonic_ms() - began_ms)
        self._counted.prefilled_tokens += tokens
        self._counted.decode_passes += bool(running)
        self._counted.decoded_tokens += len(running)
        for sequence, outcome in zip(running, outcomes, strict=False):
            self._append(sequence, outcome, len(running))
        for sequence, outcome in zip(chosen, outcomes[len(running) :], strict=True):
            self._advance(sequence, outcome)

    def _compute_timed(self, sequence: ActiveSequence) -> None:
        """A piece of a long prompt, in a pass of its own: its duration decides the size of the next one."""
        if sequence.left:
            return
        began_ms = self._clock.monotonic_ms()
        self._announce()
        (outcome,) = self._forward.run([sequence])
        self._scheduler.learn_piece(sequence, self._clock.monotonic_ms() - began_ms)
        self._counted.prefilled_tokens += sequence.piece_tokens
        self._advance(sequence, outcome)

    def _append(self, sequence: ActiveSequence, outcome: Outcome, rows: int) -> None:
        """Give a running sequence its next token, out of a pass over so many running sequences."""
        if sequence.left:
            return
        if isinstance(outcome, Exception):
            self._fail(sequence, self._reason("decode", outcome))
            return
        sequence.output.append(outcome)
        sequence.rows_decoded += rows

    def _advance(self, sequence: ActiveSequence, outcome: Outcome) -> None:
        """A piece of the prompt is computed. After the last one the sequence runs, or has finished."""
        if sequence.left:
            return
        try:
            if isinstance(outcome, Exception):
                raise outcome
            self._check_finite(sequence)
            if sequence.missing:
                return
            sequence.first_token_ms = sequence.computed_ms
            sequence.output.append(outcome)
            self._store(sequence)
            reason = finish_reason(sequence, self.model.max_len, self._clock.wall_ms())
            if reason is None:
                self._rows.join(sequence)
            else:
                tell_token(sequence, reason)
                self._finish(sequence, reason)
                self._take_out(sequence)
        except Exception as error:  # one failing request fails alone; the others' rows are untouched
            self._fail(sequence, self._reason("prefill", error))
            return
        if sequence.leader is None:
            for follower in sequence.parent.sequences[1:]:
                self._scheduler.add(follower)

    # Finish.

    def _leave(self) -> None:
        """Take out what has finished."""
        for sequence in reversed(tuple(self._rows.running)):
            if sequence.left:
                continue
            try:
                reason = finish_reason(sequence, self.model.max_len, self._clock.wall_ms())
                tell_token(sequence, reason)
                if reason is None and self._clock.wall_ms() < sequence.times_out_ms:
                    continue
                self._check_finite(sequence)
                if reason is None:
                    self._fail(sequence, self._timeout(sequence))
                    continue
                self._finish(sequence, reason)
            except Exception as error:  # one answer that cannot be written as text fails alone
                self._fail(sequence, self._reason("answer", error))
                continue
            chunk_tokens = self.chunk_shape.chunk_tokens
            if sequence.finite // chunk_tokens > len(sequence.prompt) // chunk_tokens:
                self._store(sequence)
            self._take_out(sequence)

    def _finish(self, sequence: ActiveSequence, reason: FinishReason) -> None:
        """One choice is complete. With the last one of its request, the request is."""
        parent = sequence.parent
        parent.completions[sequence.choice] = completion_of(
            sequence, reason, self.model.tokenizer, self._clock.wall_ms()
        )
        if len(parent.completions) == len(parent.sequences):
            self._requests.remove(parent)
            self._done.append(combined([parent.completions[choice] for choice in range(len(parent.sequences))]))

    def _fail(self, sequence: ActiveSequence, reason: str) -> None:
        """The request of a sequence fails, with all its choices."""
        self._let_go(sequence.parent)
        self._done.append(Failure(sequence.request, reason))

    def _let_go(self, parent: ActiveRequest) -> None:
        self._requests.remove(parent)
        self._take_out(*parent.sequences)

    def _take_out(self, *sequences: ActiveSequence) -> None:
        """Free what sequences have, wherever they are."""
        here = [sequence for sequence in sequences if not sequence.left]
        self._scheduler.withdraw(here)
        for sequence in here:
            sequence.left = True
            if sequence.row < 0:
                _drop_prefetch(sequence)
            else:
                self._rows.remove(sequence)

    def _store(self, sequence: ActiveSequence) -> None:
        if self._reuse is not None and not self._reuse.store(sequence):
            self._counted.failed_stores += 1

    def _check_finite(self, sequence: ActiveSequence) -> None:
        """Raises `NotFiniteError` unless all keys and values of the sequence are finite."""
        if not self._rows.check_finite(sequence):
            raise NotFiniteError

    def _reason(self, stage: str, error: Exception) -> str:
        """Why a request failed, for its sender."""
        if isinstance(error, NotFiniteError):
            return self._not_finite()
        return str(error) if isinstance(error, UserError) else f"{stage} failed: {type(error).__name__}: {error}"

    def _not_finite(self) -> str:
        dtype = str(self.chunk_shape.dtype).removeprefix("torch.")
        advice = {
            "float16": "load it with --dtype bfloat16 or float32",
            "bfloat16": "load it with --dtype float32",
        }.get(dtype, "look for NaN or infinity in its weights")
        return f"the model's values are not finite in {dtype} for this request; {advice}"

    def _timeout(self, sequence: ActiveSequence) -> str:
        where = "in the queue" if sequence.row < 0 else f"with {len(sequence.output)} tokens of its answer"
        return f"{timed_out(self._timeout_ms)} ({where})"


def _drop_prefetch(sequence: ActiveSequence) -> None:
    if sequence.prefetch is not None:
        sequence.prefetch.cancel()

"""The step loop: requests enter, are prefilled over what the cache has, decode together, and leave.

Prefill is bound by computation and decode by memory bandwidth. A step is one forward pass: one token of every running
sequence, and pieces of prompts, of which only what is not reused, up to a budget of tokens (iteration level scheduling:
Orca, OSDI 2022; chunked prefill and hybrid batches under a token budget: Sarathi-Serve, OSDI 2024). Sequences enter and
leave between steps, so that no long prompt or answer holds the others.
"""

import heapq
import itertools
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from cache.protocol import KVCache
from core.clock import Clock
from core.errors import UserError
from core.records import FinishReason, Request
from inference_service.active_sequence import ActiveSequence
from inference_service.completion import Completion, Failure, timed_out
from inference_service.config import EngineConfig
from inference_service.detokenize import answer_text
from inference_service.host_memory import keep_freed_memory
from inference_service.logprobs import token_logprobs
from inference_service.model import LoadedModel, load_model
from inference_service.packed_linear import pack_linears
from inference_service.pieces import Piece
from inference_service.prompts import end_tokens_of, prompt_tokens
from inference_service.protocol import ServedModel
from inference_service.sampling import BatchSampler, SequenceSampler
from inference_service.stats import EngineStats
from inference_service.stop_strings import StopStrings
from inference_service.support import checked

logger = logging.getLogger(__name__)

MOST_PARTIAL = 4
"""Prompts that may be computed in pieces at a time; more would only finish later."""
MOST_PASS_TOKENS = 2048
"""Maximum prompt tokens per pass when `step_prefill_tokens` is 0. Larger passes need more memory and are no faster: the
GEMMs are compute-bound by then. A single prompt may be longer."""
LONG_SHARE = 0.25
"""Share of the engine's time for prompts that exceed a step's budget, while other sequences decode."""

IDLE_WAIT_S = 0.005
"""Longest that a step waits for Redis where nothing runs."""


_Outcome = int | Exception
"""What a pass gives to a sequence: the token that follows its piece, or why there is none."""


class Engine:
    """One model, rows to run sequences in, one cache. Single-threaded: call everything from one thread."""

    def __init__(
        self,
        model: ServedModel,
        config: EngineConfig,
        cache: KVCache | None,
        chunk_tokens: int,
        clock: Clock,
        *,
        on_begin: Callable[[Sequence[Request]], None] = lambda requests: None,
        on_pass: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_begin` is called before anything is computed or looked up for requests that have waited, `on_pass` after
        each pass.
        """
        self.model = model
        self.chunk_shape = model.chunk_shape(chunk_tokens)
        self._cache = cache
        self._clock = clock
        self._on_begin = on_begin
        self._on_pass = on_pass
        self._timeout_ms = config.request_timeout_ms or math.inf
        self._runner = model.make_runner(config.max_running, chunk_tokens)
        self._sampler = BatchSampler()
        self._most_tokens = config.max_running_tokens or config.max_running * model.max_len
        self._step_tokens = config.step_prefill_tokens or math.inf
        self._piece_ms = config.step_prefill_ms or math.inf
        self._waiting: list[tuple[int, int, ActiveSequence]] = []
        self._arrivals = itertools.count()
        self._prefilling: list[ActiveSequence] = []
        """Those whose prompt is computed in part, in the order in which they began."""
        self._running: list[ActiveSequence] = []
        """The sequence at index i owns row i."""
        self._unannounced: list[Request] = []
        """Those that begin in this step, and that `on_begin` has not been told of."""
        self._next_expiry_ms = math.inf
        self._done = EngineStats()
        self._prefill_ms_per_token: float | None = None
        self._decode_ms: float | None = None
        """Average duration of decode-only passes."""
        self._long_debt_ms = 0.0
        """Time that long prompts have had beyond their share."""

    @property
    def unfinished(self) -> int:
        return len(self._waiting) + len(self._prefilling) + len(self._running)

    @property
    def stats(self) -> EngineStats:
        """Current counters. The moment may be between two passes of a step."""
        return replace(
            self._done, waiting=len(self._waiting), prefilling=len(self._prefilling), running=len(self._running)
        )

    @property
    def waiting_since_ms(self) -> float | None:
        """Arrival of the request that has waited for longest without having begun; none if none waits."""
        return min((sequence.arrived_ms for _, _, sequence in self._waiting), default=None)

    def submit(self, request: Request, arrived_ms: float) -> None:
        """Queue a request; a higher `priority` goes first, then who came first.

        `arrived_ms`: wall time of its arrival. Raises `UserError` for a request that this model cannot answer.
        """
        prompt = prompt_tokens(request, self.model)
        expires_ms = math.inf if request.deadline_ms is None else request.created_at_ms + request.deadline_ms
        weight = min(len(prompt) + request.max_new_tokens, self.model.max_len)
        sampling, rules = self.model.generation.of(request), self.model.generation.rules
        end_tokens = end_tokens_of(request, sampling, rules, self.model)
        sampler = SequenceSampler(
            sampling, rules, prompt=prompt, most_tokens=weight - len(prompt), end_tokens=end_tokens
        )
        stop = StopStrings(request.stop, self.model.tokenizer, sampling.min_new_tokens) if request.stop else None
        times_out_ms = arrived_ms + self._timeout_ms
        sequence = ActiveSequence(request, prompt, sampler, arrived_ms, expires_ms, times_out_ms, weight, stop)
        if self._cache is not None:
            sequence.prefetch = self._cache.prefetch(
                prompt, request.cache_salt, self._prefill_ms_per_token, request.priority
            )
        self._next_expiry_ms = min(self._next_expiry_ms, sequence.ends_ms)
        heapq.heappush(self._waiting, (-request.priority, next(self._arrivals), sequence))

    def cancel(self, request: Request) -> bool:
        """Drop this very object: no completion and no failure follows. To be called between two steps.

        Returns false if it is not in the engine, for instance because it has finished.
        """
        for place, (_, _, sequence) in enumerate(self._waiting):
            if sequence.request is request:
                _drop_prefetch(sequence)
                del self._waiting[place]
                heapq.heapify(self._waiting)
                return True
        for sequence in self._prefilling:
            if sequence.request is request:
                self._prefilling.remove(sequence)
                self._clear_doubtful(sequence)
                return True
        for sequence in self._running:
            if sequence.request is request:
                self._take_out(sequence)
                return True
        return False

    def step(self) -> list[Completion | Failure]:
        """One token of all that runs, and pieces of prompts within the step's budget; what has finished."""
        began_ms, owed_ms = self._clock.monotonic_ms(), self._long_debt_ms
        done: list[Completion | Failure] = list(self._expire())
        chosen, failed = self._choose()
        done += failed
        if not (chosen or done or self._running):
            self._await_prefetch()
        running = tuple(self._running)
        for group in _passes([sequence for sequence in chosen if not self._is_timed(sequence)]):
            self._compute(running, group, done)
            running = ()
        for sequence in chosen:
            if self._is_timed(sequence):
                self._compute_timed(sequence, done)
        done += self._leave()
        self._pay(self._clock.monotonic_ms() - began_ms - (self._long_debt_ms - owed_ms))
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
        """Run each kind of forward pass once, in an idle engine: first calls allocate and choose kernels.

        The prompts together are no more than a step may compute, so that memory is not taken for a pass of a size that
        never comes.
        """
        most = int(min(self._step_tokens, MOST_PASS_TOKENS))
        prompt = [0] * min(self.chunk_shape.chunk_tokens, self.model.max_len - 1, most)
        prompts = min(self._runner.rows, most // len(prompt))
        self._runner.forward([Piece(row, 0, prompt) for row in range(prompts)])
        self._runner.forward([Piece(row, len(prompt), [0]) for row in range(self._runner.rows)])
        for row in range(self._runner.rows):
            self._runner.pool.clear(row, 0, len(prompt) + 1)

    def close(self) -> None:
        for _, _, sequence in self._waiting:
            _drop_prefetch(sequence)
        if self._cache is not None:
            self._cache.close()

    def _expire(self) -> Iterator[Completion | Failure]:
        """Let go of those whose time is over before their first token: waiting for a row must not hide it."""
        now_ms = self._clock.wall_ms()
        if now_ms < self._next_expiry_ms:
            return
        late = [sequence for _, _, sequence in sorted(self._waiting) if now_ms >= sequence.ends_ms]
        for sequence in late:
            sequence.began_ms = self._clock.wall_ms()
            _drop_prefetch(sequence)
        if late:
            self._waiting = [entry for entry in self._waiting if entry[2] not in late]
            heapq.heapify(self._waiting)
        partial = [sequence for sequence in self._prefilling if now_ms >= sequence.ends_ms]
        self._prefilling = [sequence for sequence in self._prefilling if sequence not in partial]
        remaining = [*(sequence for _, _, sequence in self._waiting), *self._prefilling]
        self._next_expiry_ms = min((sequence.ends_ms for sequence in remaining), default=math.inf)
        for sequence in (*late, *partial):
            self._clear_doubtful(sequence)
            own = now_ms >= sequence.expires_ms
            yield self._complete(sequence, FinishReason.DEADLINE) if own else self._timeout(sequence)

    def _choose(self) -> tuple[list[ActiveSequence], list[Failure]]:
        """Spend the step's budget on prompts: whose pieces to compute, and who could not begin.

        Half of it belongs to the prompt that has been in pieces for longest, so that it ends; the rest first goes to
        those that began later, the shortest first, and to new ones, so that a long prompt does not hold short ones.
        A new one whose chunks are on their way from Redis lets others pass that leave it its room.
        Among long prompts alone the shortest takes a whole pass, whatever the budget.
        """
        chosen: list[ActiveSequence] = []
        failed: list[Failure] = []
        oldest = self._prefilling[0] if self._prefilling else None
        left = self._step_tokens
        kept = min(left // 2, self._most_of(oldest)) if oldest is not None else 0.0

        def take(sequence: ActiveSequence, most: float) -> int:
            if self._only_long_prompts():
                most = MOST_PASS_TOKENS if sequence is min(self._prefilling, key=_shortest) else 0
            sequence.piece_tokens = int(min(most, self._most_of(sequence)))
            if sequence.piece_tokens > 0:
                chosen.append(sequence)
            return sequence.piece_tokens

        for sequence in sorted(self._prefilling[1:], key=_shortest):
            left -= take(sequence, left - kept)
        room = _Room(self._running, self._prefilling, self._runner.rows, self._most_tokens)
        passed: list[tuple[int, int, ActiveSequence]] = []
        while left > kept and self._waiting:
            sequence = self._waiting[0][2]
            if not room.has(sequence) or self._may_reuse(sequence, chosen):
                break
            entry = heapq.heappop(self._waiting)
            if sequence.is_fetching:
                passed.append(entry)
                room.keep(sequence)
                continue
            try:
                self._begin(sequence, room)
            except torch.AcceleratorError:
                raise
            except Exception as error:  # one failing request fails alone; the others' rows are untouched
                failed.append(_failure(sequence, "cache", error))
                continue
            self._prefilling.append(sequence)
            left -= take(sequence, left - kept)
            room.give(sequence)
        for entry in passed:
            heapq.heappush(self._waiting, entry)
        if oldest is not None:
            take(oldest, left)
        return chosen, failed

    def _await_prefetch(self) -> None:
        """Wait for the chunks of the first request of the queue, where nothing runs.

        For a short time, so that a request that comes meanwhile is taken in soon.
        """
        if self._waiting and (prefetch := self._waiting[0][2].prefetch) is not None:
            prefetch.wait(IDLE_WAIT_S)

    def _may_reuse(self, sequence: ActiveSequence, chosen: Sequence[ActiveSequence]) -> bool:
        """Whether this step computes a chunk that the sequence begins with as well: a step later it need not.

        Such a sequence waits once only, and all that wait for the same chunk wait together: the cache may not keep it.
        """
        if self._cache is None or sequence.waited_for_reuse:
            return False
        for other in chosen:
            end = (other.held // self.chunk_shape.chunk_tokens + 1) * self.chunk_shape.chunk_tokens
            if other.ends_prompt and end <= len(other.prompt) and _shares(sequence, other, end):
                for _, _, waiting in self._waiting:
                    waiting.waited_for_reuse = waiting.waited_for_reuse or _shares(waiting, other, end)
                return True
        return False

    def _begin(self, sequence: ActiveSequence, room: "_Room") -> None:
        """Give the sequence a free row, filled with what the cache has."""
        logger.debug("request %r begins", sequence.request.request_id)
        self._unannounced.append(sequence.request)
        sequence.began_ms = self._clock.wall_ms()
        sequence.began_with = len(self._running) + len(self._prefilling) + 1
        sequence.row = room.free_row(is_long=len(sequence.prompt) > self._step_tokens)
        # Chunks are finite: none is stored, or taken from Redis, without having been looked at.
        sequence.held = sequence.finite = sequence.touched = self._reuse(sequence)
        sequence.long = sequence.missing > self._step_tokens

    def _announce(self) -> None:
        """Tell of those that are about to begin: should the process die of one, it is known who it may have been."""
        if self._unannounced:
            requests, self._unannounced = self._unannounced, []
            self._on_begin(requests)

    def _compute_timed(self, sequence: ActiveSequence, done: list[Completion | Failure]) -> None:
        """A piece of a long prompt, in a pass of its own: what it takes decides how much comes next."""
        began_ms = self._clock.monotonic_ms()
        tokens = sequence.piece_tokens
        self._done.prefilled_tokens += tokens
        (outcome,) = self._forward([sequence])
        took_ms = self._clock.monotonic_ms() - began_ms
        sequence.ms_per_token = took_ms / tokens
        self._long_debt_ms += took_ms
        self._learn_prefill_cost(tokens, took_ms)
        self._advance(sequence, outcome, done)

    def _compute(
        self, running: Sequence[ActiveSequence], chosen: Sequence[ActiveSequence], done: list[Completion | Failure]
    ) -> None:
        """A pass over what runs and the pieces of those chosen."""
        if not running and not chosen:
            return
        began_ms = self._clock.monotonic_ms()
        outcomes = self._forward([*running, *chosen])
        took_ms = self._clock.monotonic_ms() - began_ms
        tokens = sum(sequence.piece_tokens for sequence in chosen)
        self._done.prefilled_tokens += tokens
        self._done.decode_passes += bool(running)
        self._done.decoded_tokens += len(running)
        if not chosen:
            self._decode_ms = _averaged(self._decode_ms, took_ms)
        elif (rows_ms := self._decode_ms if running else 0.0) is not None:
            self._learn_prefill_cost(tokens, took_ms - rows_ms)
        for sequence, outcome in zip(running, outcomes, strict=False):
            self._append(sequence, outcome, len(running), done)
        for sequence, outcome in zip(chosen, outcomes[len(running) :], strict=True):
            self._advance(sequence, outcome, done)

    def _forward(self, sequences: Sequence[ActiveSequence]) -> list[_Outcome]:
        """What a pass gives to each. Where it fails each is tried alone, so that one failing request fails alone.

        All of them hold what was computed before anything is moved from row to row.
        Raises `torch.AcceleratorError`: nothing runs on the device in this process any more.
        """
        self._announce()
        pieces = [sequence.piece for sequence in sequences]
        for sequence, piece in zip(sequences, pieces, strict=True):
            sequence.touched = piece.end
        failed: Exception | None = None
        try:
            logits = self._runner.forward(pieces)
            draws = [sequence.draw for sequence in sequences]
            asked = [
                place for place, draw in enumerate(draws) if draw and sequences[place].request.logprobs is not None
            ]
            # A copy: sampling may overwrite the logits.
            own_logits = logits[asked] if asked else None
            tokens = self._sampler.sample(logits, draws)
            if own_logits is not None:
                _add_logprobs([(sequences[place], tokens[place]) for place in asked], own_logits)
            computed_ms = self._clock.wall_ms()
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if len(sequences) > 1:
                logger.exception("a pass over %d sequences failed; each is tried alone", len(sequences))
            # Its frames hold the tensors of the pass, that others need the memory of.
            failed = error.with_traceback(None)
            self._done.failed_passes += 1
        self._done.passes += 1
        self._on_pass()
        if failed is not None:
            if isinstance(failed, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            return [failed] if len(sequences) == 1 else [self._forward([sequence])[0] for sequence in sequences]
        for sequence, piece in zip(sequences, pieces, strict=True):
            sequence.held = piece.end
            sequence.computed_ms = computed_ms
        return [self._not_finite() if token is None else token for token in tokens]

    def _append(self, sequence: ActiveSequence, outcome: _Outcome, rows: int, done: list[Completion | Failure]) -> None:
        """Give a running sequence its next token, of a pass of so many rows; one that fails leaves."""
        try:
            token = _checked(outcome)
        except Exception as error:  # one failing request fails alone
            done.append(_failure(sequence, "decode", error))
            self._take_out(sequence)
            return
        sequence.output.append(token)
        sequence.rows_decoded += rows

    def _advance(self, sequence: ActiveSequence, outcome: _Outcome, done: list[Completion | Failure]) -> None:
        """A piece of its prompt is computed. After the last it runs, or is done."""
        try:
            token = _checked(outcome)
            self._check_finite(sequence)
            if sequence.missing:
                return
            self._prefilling.remove(sequence)
            sequence.first_token_ms = sequence.computed_ms
            sequence.output.append(token)
            self._store(sequence)
            reason = self._finish_reason(sequence)
            if reason is None:
                self._join(sequence)
            else:
                done.append(self._complete(sequence, reason))
        except Exception as error:  # one failing request fails alone; the others' rows are untouched
            if sequence in self._prefilling:
                self._prefilling.remove(sequence)
            self._clear_doubtful(sequence)
            done.append(_failure(sequence, "prefill", error))

    def _most_of(self, sequence: ActiveSequence) -> int:
        """Tokens that the time of this step allows of its prompt: of one that fits into a step's budget, all.

        A budget of tokens alone means milliseconds on one device and a second on another.
        """
        if not self._is_timed(sequence):
            return sequence.missing
        if self._running and self._long_debt_ms > 0:
            return 0
        # While nothing runs, only a request that arrives meanwhile would wait.
        time_ms = self._piece_ms if self._running else 2 * self._piece_ms
        cost = sequence.ms_per_token or self._prefill_ms_per_token
        in_time = int(time_ms / cost) if cost else int(self._step_tokens)
        # Passes below the step's budget of tokens cost more per token, and nobody would gain from them here.
        least = int(self._step_tokens) if self._only_long_prompts() else self.chunk_shape.chunk_tokens
        return min(sequence.missing, max(in_time, least))

    def _only_long_prompts(self) -> bool:
        """Whether nothing runs, nothing waits, and every prompt that has begun is computed in timed pieces."""
        return not self._running and not self._waiting and all(map(self._is_timed, self._prefilling))

    def _is_timed(self, sequence: ActiveSequence) -> bool:
        return sequence.long and not math.isinf(self._piece_ms)

    def _pay(self, others_ms: float) -> None:
        """A step in which others took so long earns long prompts their share."""
        earned_ms = others_ms * LONG_SHARE / (1 - LONG_SHARE)
        self._long_debt_ms = max(0.0, self._long_debt_ms - earned_ms) if self._running else 0.0

    def _join(self, sequence: ActiveSequence) -> None:
        """Move it to the row after the running ones, which it then belongs to."""
        target = len(self._running)
        if sequence.row != target:
            other = next((other for other in self._prefilling if other.row == target), None)
            if other is None:
                self._runner.pool.move_row(sequence.row, target, sequence.held)
            else:
                self._runner.pool.swap_rows(sequence.row, sequence.held, target, other.held)
                # Of the longer one the end stays behind, which is not known to be finite before its own turn.
                doubtful = max(sequence.held, other.finite)
                if doubtful < other.touched:
                    self._runner.pool.clear(target, doubtful, other.touched)
                other.row = sequence.row
            sequence.row = target
        self._running.append(sequence)

    def _reuse(self, sequence: ActiveSequence) -> int:
        """Fill the row from the cache; the number of prompt tokens that need no computing."""
        if self._cache is None:
            return 0
        self._announce()
        tokens = self.chunk_shape.chunk_tokens
        with self._cache.lookup(sequence.prompt, sequence.request.cache_salt, sequence.prefetch) as lease:
            sequence.capacity_chunks, sequence.used_chunks = lease.capacity_chunks, lease.used_chunks
            # The last prompt token is always computed: its logits are the first answer token's. Where the chunks
            # reach the very end, the last one counts one token less.
            limit = len(sequence.prompt) - 1
            if lease.chunks:
                self._runner.pool.load_chunks(sequence.row, lease.chunks)
            for index, tier in enumerate(lease.tiers):
                counted = min(tokens, limit - index * tokens)
                if tier == "local":
                    sequence.local_tokens += counted
                else:
                    sequence.remote_tokens += counted
            # The prefix's memory may change once it is released.
            self.model.wait_for_device()
        self._done.local_tokens += sequence.local_tokens
        self._done.remote_tokens += sequence.remote_tokens
        return sequence.local_tokens + sequence.remote_tokens

    def _store(self, sequence: ActiveSequence) -> None:
        """Keep the row's full chunks. A store that fails is a miss later, and no fault of the request."""
        if self._cache is None:
            return
        try:
            self._cache.store(
                sequence.tokens[: sequence.finite],
                self._runner.pool.chunk_reader(sequence.row, sequence.finite),
                sequence.request.cache_salt,
            )
        except Exception:
            self._done.failed_stores += 1
            logger.exception("chunks of request %r could not be stored", sequence.request.request_id)

    def _leave(self) -> list[Completion | Failure]:
        """Take out what has finished."""
        done: list[Completion | Failure] = []
        for sequence in reversed(tuple(self._running)):
            reason = self._finish_reason(sequence)
            if reason is None and self._clock.wall_ms() < sequence.times_out_ms:
                continue
            try:
                self._check_finite(sequence)
                done.append(self._complete(sequence, reason) if reason is not None else self._timeout(sequence))
            except Exception as error:  # one answer that cannot be written as text fails alone
                done.append(_failure(sequence, "answer", error))
            chunks, of_prompt = (
                count // self.chunk_shape.chunk_tokens for count in (sequence.finite, len(sequence.prompt))
            )
            if chunks > of_prompt:
                self._store(sequence)
            self._take_out(sequence)
        return done

    def _check_finite(self, sequence: ActiveSequence) -> None:
        """Look at the keys and values that were computed since the last time. Raises `UserError`.

        They can be infinite, or outside of a window, without a trace in the logits.
        """
        if not self._runner.pool.is_finite(sequence.row, sequence.finite, sequence.held):
            raise self._not_finite()
        sequence.finite = sequence.held

    def _clear_doubtful(self, sequence: ActiveSequence) -> None:
        """Clear what a sequence may leave in its row that is not finite.

        Whoever takes the row next reads all of it where a longer sequence runs beside it: attention masks what is not
        its own by adding to it, and NaN plus anything is NaN.
        """
        if sequence.finite < sequence.touched:
            self._runner.pool.clear(sequence.row, sequence.finite, sequence.touched)

    def _not_finite(self) -> UserError:
        dtype = str(self.chunk_shape.dtype).removeprefix("torch.")
        advice = {
            "float16": "load it with --dtype bfloat16 or float32",
            "bfloat16": "load it with --dtype float32",
        }.get(dtype, "look for NaN or infinity in its weights")
        return UserError(f"the model's values are not finite in {dtype} for this request; {advice}")

    def _take_out(self, sequence: ActiveSequence) -> None:
        """The last running row moves into the gap."""
        self._clear_doubtful(sequence)
        last = self._running.pop()
        if last is not sequence:
            self._runner.pool.move_row(last.row, sequence.row, last.held)
            self._clear_doubtful(last)
            last.row = sequence.row
            self._running[last.row] = last

    def _finish_reason(self, sequence: ActiveSequence) -> FinishReason | None:
        if sequence.output[-1] in sequence.sampler.end_tokens:
            return FinishReason.STOP
        if sequence.stop is not None:
            sequence.stopped_text = sequence.stop.text_before(sequence.prompt, sequence.output)
            if sequence.stopped_text is not None:
                return FinishReason.STOP
        if len(sequence.output) >= sequence.request.max_new_tokens:
            return FinishReason.LENGTH
        if len(sequence.prompt) + len(sequence.output) >= self.model.max_len:
            return FinishReason.CONTEXT
        return FinishReason.DEADLINE if self._expired(sequence) else None

    def _expired(self, sequence: ActiveSequence) -> bool:
        return self._clock.wall_ms() >= sequence.expires_ms

    def _timeout(self, sequence: ActiveSequence) -> Failure:
        where = "in the queue" if sequence.row < 0 else f"with {len(sequence.output)} tokens of its answer"
        return Failure(sequence.request, f"{timed_out(self._timeout_ms)} ({where})")

    def _complete(self, sequence: ActiveSequence, reason: FinishReason) -> Completion:
        text = sequence.stopped_text
        ended = reason is FinishReason.STOP and text is None
        answer = sequence.output[:-1] if ended else sequence.output
        prompt = len(sequence.prompt)
        steps = max(0, len(sequence.output) - 1)
        return Completion(
            request=sequence.request,
            text=answer_text(self.model.tokenizer, sequence.prompt, answer) if text is None else text,
            token_ids=tuple(answer),
            logprobs=None if sequence.request.logprobs is None else tuple(sequence.logprobs[: len(answer)]),
            finish_reason=reason,
            sampling=sequence.sampler.sampling,
            prompt_tokens=prompt,
            local_tokens=sequence.local_tokens,
            remote_tokens=sequence.remote_tokens,
            computed_tokens=prompt - sequence.local_tokens - sequence.remote_tokens,
            decode_steps=steps,
            decode_rows=sequence.rows_decoded / steps if steps else None,
            began_with=sequence.began_with,
            cache_capacity_chunks=sequence.capacity_chunks,
            cache_used_chunks=sequence.used_chunks,
            arrived_ms=sequence.arrived_ms,
            began_ms=sequence.began_ms,
            first_token_ms=sequence.first_token_ms,
            last_token_ms=sequence.computed_ms if sequence.output else None,
            finished_ms=self._clock.wall_ms(),
        )

    def _learn_prefill_cost(self, tokens: int, took_ms: float) -> None:
        """Online average over long prefills; a short one is mostly the fixed cost of a pass."""
        if tokens >= self.chunk_shape.chunk_tokens and took_ms > 0:
            self._prefill_ms_per_token = _averaged(self._prefill_ms_per_token, took_ms / tokens)


class _Room:
    """What a step has left for those that may begin in it: rows, the tokens that all may come to hold, and prompts in
    pieces. It counts on from what runs, as a step may begin hundreds.
    """

    def __init__(
        self, running: Sequence[ActiveSequence], prefilling: Sequence[ActiveSequence], rows: int, most_tokens: int
    ) -> None:
        """To be made after the step has chosen its pieces of all `prefilling` sequences but the first."""
        self._most_tokens = most_tokens
        self._held_tokens = sum(one.weight for one in running) + sum(one.weight for one in prefilling)
        self._partial = sum(one is prefilling[0] or not one.ends_prompt for one in prefilling)
        taken = {one.row for one in prefilling}
        self._rows = deque(row for row in range(len(running), rows) if row not in taken)
        self._kept = 0
        """Rows reserved for sequences that wait for chunks while others overtake them."""

    def has(self, sequence: ActiveSequence) -> bool:
        """A sequence that is alone always has room, however heavy it is."""
        return self._held_tokens == 0 or (
            len(self._rows) > self._kept
            and self._partial < MOST_PARTIAL
            and self._held_tokens + sequence.weight <= self._most_tokens
        )

    def keep(self, sequence: ActiveSequence) -> None:
        """It is passed by others, and keeps its room."""
        self._kept += 1
        self._partial += 1
        self._held_tokens += sequence.weight

    def free_row(self, *, is_long: bool) -> int:
        """The lowest free row, where a sequence may run soon; for a long prompt the highest, in nobody's way."""
        return self._rows[-1] if is_long else self._rows[0]

    def give(self, sequence: ActiveSequence) -> None:
        """It has begun in the row that it was shown, and what the step computes of it is chosen."""
        self._rows.remove(sequence.row)
        self._partial += not sequence.ends_prompt
        self._held_tokens += sequence.weight


def _shortest(sequence: ActiveSequence) -> tuple[int, int]:
    """Sort key: a higher priority first, then what has the least left to compute."""
    return -sequence.request.priority, sequence.missing


def _passes(chosen: Iterable[ActiveSequence]) -> list[list[ActiveSequence]]:
    """The chosen in order, in groups of at most `MOST_PASS_TOKENS`; the first one may be empty."""
    groups: list[list[ActiveSequence]] = [[]]
    tokens = 0
    for sequence in chosen:
        if groups[-1] and tokens + sequence.piece_tokens > MOST_PASS_TOKENS:
            groups.append([])
            tokens = 0
        groups[-1].append(sequence)
        tokens += sequence.piece_tokens
    return groups


def _shares(sequence: ActiveSequence, other: ActiveSequence, tokens: int) -> bool:
    """Whether the first `tokens` of both prompts are equal and reusable between them."""
    return (
        sequence.request.cache_salt == other.request.cache_salt
        and tokens < len(sequence.prompt)
        and sequence.prompt[:tokens] == other.prompt[:tokens]
    )


def _add_logprobs(drawn: Sequence[tuple[ActiveSequence, int | None]], logits: torch.Tensor) -> None:
    """`logits` `[drawn, vocabulary]`. A sequence without a token fails, and needs none."""
    usable = [place for place, (_, token) in enumerate(drawn) if token is not None]
    if not usable:
        return
    sequences = [drawn[place][0] for place in usable]
    tokens = [token for _, token in drawn if token is not None]
    found = token_logprobs(logits[usable], tokens, [sequence.request.logprobs or 0 for sequence in sequences])
    for sequence, logprob in zip(sequences, found, strict=True):
        sequence.logprobs.append(logprob)


def _drop_prefetch(sequence: ActiveSequence) -> None:
    if sequence.prefetch is not None:
        sequence.prefetch.cancel()


def _checked(outcome: _Outcome) -> int:
    """Raises what the pass raised."""
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _averaged(average: float | None, value: float) -> float:
    return value if average is None else 0.8 * average + 0.2 * value


def _failure(sequence: ActiveSequence, stage: str, error: Exception) -> Failure:
    if isinstance(error, UserError):
        return Failure(sequence.request, str(error))
    return Failure(sequence.request, f"{stage} failed: {type(error).__name__}: {error}")


def load_checked_model(config: EngineConfig, slot: int = 0) -> LoadedModel:
    """A loaded model that the pool is known to run as the model alone would. Raises `UserError`."""
    model = load_model(config, slot)
    if model.device.type == "cpu":
        keep_freed_memory()
    pack_linears(model.model)
    model = checked(model)
    # Made now and not by the first request: that takes a second where the vocabulary is large.
    logger.info("%s takes the texts of messages as %s", model.name, model.prompt_encoder.content_form)
    return model

"""One inference slot: one model on one device, one engine, one cache."""

import itertools
import logging
import time
from collections.abc import Callable, Sequence

import psutil

from cache.manager import TwoLevelCache, open_cache
from cache.protocol import ChunkShape, ModelIdentity
from core.clock import Clock
from core.errors import UserError
from core.records import MAX_RESULT_BYTES, Response
from inference_service.completion import Completion, Failure
from inference_service.engine import EngineSetting, make_engine
from operators.config import Batching, JobConfig
from operators.envelope import Answer, Envelope, Ready, RecordPosition, SlotStats, WrittenResponse
from operators.shared_state.chunk_budget import BudgetShare

logger = logging.getLogger(__name__)


class InferenceSlot:
    """Loads its model when it is made; raises `UserError` where that cannot be. Single-threaded, as the engine is."""

    def __init__(
        self,
        config: JobConfig,
        slot: int,
        clock: Clock,
        *,
        on_begin: Callable[[Sequence[RecordPosition]], None] = lambda positions: None,
        on_pass: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_begin` is called before anything is computed for requests, `on_pass` after each pass."""
        began = time.monotonic()
        self.index = slot
        self._clock = clock
        self._process = psutil.Process()
        self.threads = config.threads_per_slot
        engine = config.engine
        if config.batching.batching is Batching.MICRO:
            # Nothing else runs that a long prompt could hold up, and all leave together.
            engine = engine.model_copy(update={"step_prefill_tokens": 0})
        self._cache: TwoLevelCache | None = None
        self._share: BudgetShare | None = None

        def open_slot_cache(shape: ChunkShape, identity: ModelIdentity) -> TwoLevelCache:
            self._share = BudgetShare.of(config, slot, clock)
            self._cache = open_cache(config.cache, shape, identity, clock, self._share)
            return self._cache

        self._envelopes: dict[int, Envelope] = {}
        """What the engine has, by the identity of the request: ids of requests may repeat."""
        setting = EngineSetting(
            slot=slot,
            threads=self.threads,
            chunk_tokens=config.cache.chunk_tokens,
            clock=clock,
            open_cache=open_slot_cache if config.cache.cache else None,
            on_begin=lambda requests: on_begin([self._envelopes[id(one)].position for one in requests]),
            on_pass=on_pass,
        )
        self._engine = make_engine(engine, setting)
        self._engine.warm_up()
        self._info = self._engine.info
        self._batch_ids = (f"{slot}-{int(clock.wall_ms())}-{number}" for number in itertools.count())
        self._load_s = time.monotonic() - began

    @property
    def ready(self) -> Ready:
        return Ready(
            slot=self.index,
            device=self._info.device,
            engine=self._info.engine,
            model=self._info.model,
            dtype=self._info.dtype,
            threads=self.threads,
            chunk_bytes=self._info.chunk_bytes,
            load_s=round(self._load_s, 3),
        )

    @property
    def unfinished(self) -> int:
        return len(self._envelopes)

    @property
    def queue_ms(self) -> float:
        """For how long the request has waited that has waited for longest, since it was decoded; 0 if none waits."""
        since_ms = self._engine.waiting_since_ms
        return 0.0 if since_ms is None else max(0.0, self._clock.wall_ms() - since_ms)

    @property
    def stats(self) -> SlotStats:
        """Current counters. The moment may be between two passes of a step."""
        return SlotStats(
            engine=self._engine.stats,
            cache=None if self._cache is None else self._cache.stats(),
            resident_bytes=self._process.memory_info().rss,
        )

    def submit(self, envelope: Envelope) -> Answer | None:
        """Queue a request; one that the model cannot answer is done with at once."""
        request = envelope.request
        try:
            self._engine.submit(request, envelope.decoded_at_ms)
        except UserError as error:
            reason = str(error)
        except Exception as error:  # a tokenizer or chat template that stumbles over this one prompt
            logger.exception("request %r could not be tokenized", request.request_id)
            reason = f"prompt: {type(error).__name__}: {error}"
        else:
            self._envelopes[id(request)] = envelope
            return None
        return envelope.unanswered(reason)

    def step(self) -> list[Answer]:
        """One step of the engine; what has finished with it, each request by itself."""
        return [self._answer(envelope, result, next(self._batch_ids)) for envelope, result in self._results()]

    def answer(self, batch: Sequence[Envelope]) -> list[Answer]:
        """Answer a closed group: one response or dead letter for each envelope, in the order in which they finish.

        Records of one batch may carry the same request id: each is answered.
        """
        refused = [answer for envelope in batch if (answer := self.submit(envelope)) is not None]
        results = []
        while self.unfinished:
            results += self._results()
        batch_id, left_ms = next(self._batch_ids), self._clock.wall_ms()
        answers = [self._answer(envelope, result, batch_id, len(batch)) for envelope, result in results]
        return refused + [answer.leaving(left_ms) for answer in answers]

    def close(self) -> None:
        self._engine.close()
        if self._share is not None:
            self._share.close()

    def _results(self) -> list[tuple[Envelope, Completion | Failure]]:
        return [(self._envelopes.pop(id(result.request)), result) for result in self._engine.step()]

    def _answer(
        self, envelope: Envelope, result: Completion | Failure, batch_id: str, batch_size: int | None = None
    ) -> Answer:
        """`batch_size`: of its group; without one it is what ran in the engine when the request began."""
        if isinstance(result, Failure):
            return envelope.unanswered(result.reason)
        response = self._response(result, batch_id, batch_size or result.began_with)
        if response.is_too_long:
            return envelope.unanswered(
                f"answer: {response.output_tokens} tokens make a record above {MAX_RESULT_BYTES} bytes; ask for fewer"
            )
        return Answer(envelope.position, WrittenResponse.of(response))

    def _response(self, done: Completion, batch_id: str, batch_size: int) -> Response:
        request = done.request
        tpot_ms = None
        if done.first_token_ms is not None and done.last_token_ms is not None and done.decode_steps > 0:
            tpot_ms = (done.last_token_ms - done.first_token_ms) / done.decode_steps
        ended_ms = done.finished_ms if done.last_token_ms is None else done.last_token_ms
        return Response(
            request_id=request.request_id,
            session_id=request.session_id,
            user_id=request.user_id,
            text=done.text,
            token_ids=done.token_ids,
            logprobs=done.logprobs,
            finish_reason=done.finish_reason,
            further_choices=done.choices[1:],
            prompt_logprobs=done.prompt_logprobs,
            sampling=done.sampling,
            slot=self.index,
            device=self._info.device,
            engine=self._info.engine,
            model=self._info.model,
            batch_id=batch_id,
            batch_size=batch_size,
            decode_rows=done.decode_rows,
            prompt_tokens=done.prompt_tokens,
            local_tokens=done.local_tokens,
            remote_tokens=done.remote_tokens,
            computed_tokens=done.computed_tokens,
            output_tokens=sum(len(choice.token_ids) for choice in done.choices),
            created_at_ms=request.created_at_ms,
            completed_at_ms=done.finished_ms,
            # Clocks may be set back between two readings; a wait is never less than nothing.
            wait_ms=max(0.0, done.began_ms - done.arrived_ms),
            ttft_ms=None if done.first_token_ms is None else done.first_token_ms - request.created_at_ms,
            tpot_ms=tpot_ms,
            inference_ms=max(0.0, ended_ms - done.began_ms),
            e2e_ms=done.finished_ms - request.created_at_ms,
            cache_capacity_chunks=done.cache_capacity_chunks,
            cache_used_chunks=done.cache_used_chunks,
            chunk_bytes=self._info.chunk_bytes,
        )

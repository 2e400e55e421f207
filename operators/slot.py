"""One inference slot: one model on one device, one engine, one cache."""

import itertools
import logging
import time
from collections.abc import Sequence

import torch
import transformers
from pydantic import BaseModel, ConfigDict

from cache.manager import open_cache
from cache.redis_wire import RedisAddress
from core.clock import Clock
from core.config import JobConfig
from core.errors import UserError
from core.records import DeadLetter, Response
from inference_service.engine import Completion, Engine, Failure, load_checked_model
from inference_service.model import resolve_model
from operators.envelope import Envelope

logger = logging.getLogger(__name__)

ENGINE = f"transformers-{transformers.__version__}"


class Ready(BaseModel):
    """What a slot says once its model is loaded and warm."""

    model_config = ConfigDict(frozen=True)

    slot: int
    device: str
    engine: str
    model: str
    threads: int
    chunk_bytes: int
    load_s: float


def check_before_start(config: JobConfig) -> None:
    """Raises `UserError` for what no slot could start with, where the job is submitted and not in a worker."""
    resolve_model(config.engine.model)
    if config.cache.remote.redis_url is not None:
        RedisAddress.parse(config.cache.remote.redis_url)


class InferenceSlot:
    """Answers micro-batches. Loads its model when it is made; raises `UserError` where that cannot be."""

    def __init__(self, config: JobConfig, slot: int, clock: Clock) -> None:
        began = time.monotonic()
        self._slot = slot
        self._clock = clock
        self._threads = config.threads_per_slot
        torch.set_num_threads(self._threads)
        model = load_checked_model(config.engine, slot)
        shape = model.chunk_shape(config.cache.chunk_tokens)
        cache = open_cache(config.cache, shape, model.identity, clock) if config.cache.cache else None
        self._engine = Engine(model, config.engine, cache, config.cache.chunk_tokens, clock)
        self._engine.warm_up()
        self._batch_ids = (f"{slot}-{int(clock.wall_ms())}-{number}" for number in itertools.count())
        self._load_s = time.monotonic() - began

    @property
    def ready(self) -> Ready:
        model = self._engine.model
        return Ready(
            slot=self._slot,
            device=str(model.device),
            engine=ENGINE,
            model=model.name,
            threads=self._threads,
            chunk_bytes=self._engine.chunk_shape.size_bytes,
            load_s=round(self._load_s, 3),
        )

    def answer(self, batch: Sequence[Envelope]) -> list[Response | DeadLetter]:
        """One response or dead letter for each envelope, in the order in which they finish.

        Records of one batch may carry the same request id: each is answered.
        """
        batch_id = next(self._batch_ids)
        answers: list[Response | DeadLetter] = []
        envelopes = {}
        for envelope in batch:
            request = envelope.request
            envelopes[id(request)] = envelope
            try:
                self._engine.submit(request, envelope.decoded_at_ms)
            except UserError as error:
                answers.append(_dead_letter(str(error), request.request_id, envelope))
            except Exception as error:  # a tokenizer or chat template that stumbles over this one prompt
                logger.exception("request %r could not be tokenized", request.request_id)
                answers.append(_dead_letter(f"prompt: {type(error).__name__}: {error}", request.request_id, envelope))
        results: list[Completion | Failure] = []
        while self._engine.unfinished:
            results += self._engine.step()
        left_ms = self._clock.wall_ms()
        for result in results:
            if isinstance(result, Failure):
                answers.append(_dead_letter(result.reason, result.request.request_id, envelopes[id(result.request)]))
            else:
                answers.append(self._response(result, batch_id, len(batch), left_ms))
        return answers

    def close(self) -> None:
        self._engine.close()

    def _response(self, done: Completion, batch_id: str, batch_size: int, left_ms: float) -> Response:
        request, model = done.request, self._engine.model
        tpot_ms = None
        if done.first_token_ms is not None and done.decode_steps > 0:
            tpot_ms = (done.finished_ms - done.first_token_ms) / done.decode_steps
        return Response(
            request_id=request.request_id,
            session_id=request.session_id,
            user_id=request.user_id,
            text=done.text,
            token_ids=done.token_ids,
            finish_reason=done.finish_reason,
            slot=self._slot,
            device=str(model.device),
            engine=ENGINE,
            model=model.name,
            batch_id=batch_id,
            batch_size=batch_size,
            prompt_tokens=done.prompt_tokens,
            local_tokens=done.local_tokens,
            remote_tokens=done.remote_tokens,
            computed_tokens=done.computed_tokens,
            output_tokens=len(done.token_ids),
            created_at_ms=request.created_at_ms,
            completed_at_ms=left_ms,
            # Clocks may be set back between two readings; a wait is never less than nothing.
            wait_ms=max(0.0, done.began_ms - done.arrived_ms),
            ttft_ms=None if done.first_token_ms is None else done.first_token_ms - request.created_at_ms,
            tpot_ms=tpot_ms,
            inference_ms=max(0.0, done.finished_ms - done.began_ms),
            e2e_ms=left_ms - request.created_at_ms,
            cache_capacity_chunks=done.cache_capacity_chunks,
            cache_used_chunks=done.cache_used_chunks,
            chunk_bytes=self._engine.chunk_shape.size_bytes,
        )


def _dead_letter(reason: str, request_id: str, envelope: Envelope) -> DeadLetter:
    source = envelope.source
    return DeadLetter.of(
        envelope.raw,
        reason=reason,
        stage="inference",
        request_id=request_id,
        topic=source.topic,
        partition=source.partition,
        offset=source.offset,
    )

"""The engine alone, in its own process: the baseline for a pipeline around it."""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from benchmarks.report import device_facts, model_facts
from core.clock import SystemClock
from core.errors import UserError
from core.records import Request
from inference_service.completion import Completion, Failure
from inference_service.continuous_engine import ContinuousEngine
from inference_service.model import LoadedModel
from inference_service.transformers_engine import load_checked_model
from operators.config import JobConfig


class BareEngine:
    """Runs requests without Flink and Kafka, with a slot's model, engine and threads."""

    def __init__(self, pool: ProcessPoolExecutor, job: JobConfig) -> None:
        self._pool = pool
        self._job = job

    def facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return device and model, in the form of a `Report`."""
        return self._pool.submit(_facts, self._job).result()

    def together(self, requests: Sequence[Request]) -> tuple[int, float]:
        """Run all `requests` at once; return output tokens, and seconds from the first request to the last answer."""
        return self._pool.submit(_together, self._job, requests).result()

    def alone_ms(self, requests: Sequence[Request]) -> list[float]:
        """Run the requests one after the other on an idle engine; return each one's time in ms."""
        return self._pool.submit(_alone, self._job, requests).result()


@contextmanager
def bare_engine(job: JobConfig) -> Iterator[BareEngine]:
    """Give the engine of a slot of `job`, without a cache. The first call loads it."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield BareEngine(pool, job)


@cache
def _loaded(job: JobConfig) -> tuple[LoadedModel, ContinuousEngine]:
    """Load model and engine in the worker process, once, and warm up."""
    torch.set_num_threads(job.threads_per_slot)
    model = load_checked_model(job.engine)
    engine = ContinuousEngine(model, job.engine, None, job.cache.chunk_tokens, SystemClock())
    engine.warm_up()
    return model, engine


def _facts(job: JobConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    model, _ = _loaded(job)
    return device_facts(model), model_facts(model)


def _together(job: JobConfig, requests: Sequence[Request]) -> tuple[int, float]:
    _, engine = _loaded(job)
    began_s = time.perf_counter()
    results = engine.run(requests)
    took_s = time.perf_counter() - began_s
    return sum(len(one.token_ids) for one in _completions(results)), took_s


def _alone(job: JobConfig, requests: Sequence[Request]) -> list[float]:
    _, engine = _loaded(job)
    taken = []
    for request in requests:
        began_s = time.perf_counter()
        results = engine.run([request])
        taken.append(1000 * (time.perf_counter() - began_s))
        _completions(results)
    return taken


def _completions(results: Sequence[Completion | Failure]) -> list[Completion]:
    """Raises `UserError` if a request failed, because the others would then be a wrong measurement."""
    for result in results:
        if isinstance(result, Failure):
            raise UserError(f"{result.request.request_id}: {result.reason}")
    return [result for result in results if isinstance(result, Completion)]

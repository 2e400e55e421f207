"""What a slow Redis costs running requests: the time between their tokens while others begin, with and without a cache.

    python -m benchmarks.redis_stall --out results/benchmarks/redis_stall.json

Some requests decode all the time. Every few steps a group of others begins, each with its own prompt, and ends after a
few tokens. Redis is real, and a proxy delays each of its answers. A round has three runs: without a cache; with a cache
and no prompt in Redis; with a cache and all prompts in Redis. A gap is the time between two tokens of the requests that
decode all the time. The engine fetches every prompt from Redis, whatever cost it has learnt; otherwise it would soon
stop asking a Redis this slow.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table

from benchmarks.command import carry_out, progress, stated
from benchmarks.delaying_proxy import delayed
from benchmarks.raw_redis import delete_namespace, running_redis
from benchmarks.report import Neighbours, Report, conditions, ratios, spread
from benchmarks.reuse_probe import FLUSH_TIMEOUT_S, SteadyClock, WrongMeasurementError
from cache.config import CacheConfig, RemoteConfig, SizingConfig
from cache.manager import TwoLevelCache, open_cache
from cache.protocol import CachedPrefix, Prefetch
from core.config import Config
from core.errors import UserError, exit_on_user_error
from core.machine import usable_cores
from core.records import Request
from inference_service.completion import Completion, Failure
from inference_service.config import EngineConfig
from inference_service.continuous_engine import ContinuousEngine
from inference_service.model import LoadedModel
from inference_service.transformers_engine import load_checked_model

RUNS = ("no_cache", "unknown", "known")
"""The three runs of a round: no cache; no prompt in Redis; all prompts in Redis."""


class RedisStallConfig(Config):
    """The load, and the delay of Redis."""

    out: Path = Field(default=Path("results/benchmarks/redis_stall.json"), description="path of the report")
    rounds: int = Field(default=5, ge=1, description="measured rounds, after one to warm up")
    delay_ms: float = Field(default=80.0, ge=0, description="delay of each answer of Redis")
    running: int = Field(default=8, ge=1, description="requests that decode all the time")
    output_tokens: int = Field(default=384, ge=2, description="tokens of each of their answers")
    group: int = Field(default=8, ge=1, description="requests that begin together")
    group_every_steps: int = Field(default=128, ge=1, description="steps from one group to the next")
    prompt_tokens: int = Field(default=64, ge=1, description="prompt length of a request of a group")
    group_output_tokens: int = Field(default=4, ge=1, description="answer length of a request of a group")
    seed: int = Field(default=0, ge=0, description="random seed of the prompts")
    engine: EngineConfig = EngineConfig()


class AskingAlways:
    """A cache that fetches every prompt, whatever cost the engine has learnt."""

    def __init__(self, cache: TwoLevelCache) -> None:
        self.cache = cache
        self.shape = cache.shape

    def prefetch(
        self, token_ids: Sequence[int], salt: str = "", prefill_ms_per_token: float | None = None, priority: int = 0
    ) -> Prefetch | None:
        return self.cache.prefetch(token_ids, salt, None, priority)

    def lookup(self, token_ids: Sequence[int], salt: str = "", prefetch: Prefetch | None = None) -> CachedPrefix:
        return self.cache.lookup(token_ids, salt, prefetch)

    def store(self, token_ids: Sequence[int], read_chunk: Callable[[int, torch.Tensor], None], salt: str = "") -> int:
        return self.cache.store(token_ids, read_chunk, salt)

    def close(self, timeout_s: float = 5.0) -> None:
        self.cache.close(timeout_s)


class StallProbe:
    """One model and one Redis. Each call is a run with a new engine and a new cache."""

    def __init__(self, model: LoadedModel, config: RedisStallConfig, redis_url: str, slow_url: str) -> None:
        self._model = model
        self._config = config
        self._redis_url = redis_url
        self._slow_url = slow_url
        self.namespace = f"redis-stall-{uuid4().hex[:8]}"
        self._clock = SteadyClock()
        self._tokens = torch.Generator().manual_seed(config.seed)
        defaults = CacheConfig()
        self.settings = defaults.model_copy(
            update={
                "remote": RemoteConfig(
                    redis_namespace=self.namespace,
                    # Long enough for both round trips of a fetch that comes after those of the whole group.
                    remote_deadline_ms=max(1000.0, 4 * config.group * config.delay_ms),
                )
            }
        )

    def round(self, order: Sequence[str]) -> dict[str, list[float]]:
        """Gaps of each of `RUNS` in milliseconds, measured in `order`."""
        return {name: self._run(name) for name in order}

    def _run(self, name: str) -> list[float]:
        config = self._config
        running = [self._prompt(config.prompt_tokens) for _ in range(config.running)]
        groups = config.output_tokens // config.group_every_steps
        newcomers = [[self._prompt(config.prompt_tokens) for _ in range(config.group)] for _ in range(groups)]
        if name == "known":
            self._fill_redis([prompt for group in newcomers for prompt in group])
        cache = None if name == "no_cache" else AskingAlways(self._open(self._slow_url))
        engine = ContinuousEngine(self._model, config.engine, cache, self.settings.chunk_tokens, self._clock)
        engine.warm_up()
        try:
            gaps, done = self._gaps(engine, running, newcomers)
        finally:
            engine.close()
        self._check(name, done, expected=config.running + groups * config.group)
        return gaps

    def _gaps(
        self, engine: ContinuousEngine, running: Sequence[list[int]], groups: Sequence[Sequence[list[int]]]
    ) -> tuple[list[float], list[Completion]]:
        """Times between the ends of two steps, from when all `running` requests decode until the first one ends."""
        config = self._config
        for index, prompt in enumerate(running):
            engine.submit(_request(f"running-{index}", prompt, config.output_tokens), self._clock.wall_ms())
        done: list[Completion | Failure] = []
        while engine.stats.running < config.running:
            done += engine.step()
        left = list(groups)
        gaps: list[float] = []
        last_s = time.perf_counter()
        while not any(one.request.request_id.startswith("running") for one in done):
            if left and len(gaps) % config.group_every_steps == 0:
                for prompt in left.pop(0):
                    engine.submit(_request("newcomer", prompt, config.group_output_tokens), self._clock.wall_ms())
            done += engine.step()
            now_s = time.perf_counter()
            gaps.append((now_s - last_s) * 1000)
            last_s = now_s
        while left or engine.unfinished:
            for prompt in left.pop(0) if left else ():
                engine.submit(_request("newcomer", prompt, config.group_output_tokens), self._clock.wall_ms())
            done += engine.step()
        if refused := next((one for one in done if isinstance(one, Failure)), None):
            raise UserError(f"the engine refused a request: {refused.reason}")
        return gaps, [one for one in done if isinstance(one, Completion)]

    def _check(self, name: str, done: Sequence[Completion], expected: int) -> None:
        """Raises `WrongMeasurementError` unless the run is what its name says."""
        if len(done) != expected:
            raise WrongMeasurementError(f"{len(done)} of {expected} requests were answered")
        reused = sum(one.remote_tokens > 0 for one in done if one.request.request_id == "newcomer")
        newcomers = expected - self._config.running
        if name == "known" and reused < newcomers:
            raise WrongMeasurementError(f"{reused} of {newcomers} prompts were found in Redis")
        if name != "known" and reused:
            raise WrongMeasurementError(f"{reused} prompts came from Redis, which should have none")

    def _fill_redis(self, prompts: Sequence[list[int]]) -> None:
        """Compute the prompts and write them to Redis, without the delay."""
        cache = self._open(self._redis_url, capacity_chunks=0)
        engine = ContinuousEngine(self._model, self._config.engine, cache, self.settings.chunk_tokens, self._clock)
        engine.run([_request("writer", prompt, 1) for prompt in prompts])
        flushed = cache.flush(FLUSH_TIMEOUT_S)
        dropped = cache.stats().write_dropped
        engine.close()
        if not flushed or dropped:
            raise WrongMeasurementError("Redis did not take all chunks")

    def _open(self, url: str, capacity_chunks: int | None = None) -> TwoLevelCache:
        sizing = self.settings.sizing
        if capacity_chunks is not None:
            sizing = SizingConfig(capacity_chunks=capacity_chunks, min_capacity_chunks=0)
        remote = self.settings.remote.model_copy(update={"redis_url": url})
        settings = self.settings.model_copy(update={"remote": remote, "sizing": sizing})
        shape = self._model.chunk_shape(settings.chunk_tokens)
        return open_cache(settings, shape, self._model.identity, self._clock)

    def _prompt(self, tokens: int) -> list[int]:
        drawn: list[int] = torch.randint(0, self._model.vocab_size, (tokens,), generator=self._tokens).tolist()
        return drawn


def p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[-1] if len(values) > 1 else values[0]


def figures_of(samples: dict[str, list[float]]) -> dict[str, float]:
    """Medians and quartiles of ratios taken round by round."""
    without = samples["gap_p99_ms_no_cache"]
    figures = spread("gap_p99_over_no_cache", ratios(samples["gap_p99_ms_unknown"], without))
    figures |= spread("gap_p99_over_no_cache_known", ratios(samples["gap_p99_ms_known"], without))
    for name in RUNS:
        for kind in ("gap_p50_ms", "gap_p99_ms", "gap_max_ms"):
            figures |= spread(f"{kind}_{name}", samples[f"{kind}_{name}"])
    return {name: round(value, 4) for name, value in figures.items()}


def measure(config: RedisStallConfig, console: Console) -> Report:
    """Run everything. Raises `UserError`, and `WrongMeasurementError` if a measurement is not what it claims."""
    if config.prompt_tokens % CacheConfig().chunk_tokens:
        raise UserError(f"--prompt-tokens: give a multiple of the {CacheConfig().chunk_tokens} tokens of a chunk")
    if config.engine.max_running < config.running + config.group:
        raise UserError(f"--max-running: give at least {config.running + config.group}, so that a group can begin")
    torch.set_num_threads(config.engine.threads or usable_cores())
    # Without end-of-sequence tokens every answer has the requested length.
    model = replace(load_checked_model(config.engine), eos_token_ids=frozenset())
    samples: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as cleanup:
        directory = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="redis-stall-")))
        url = cleanup.enter_context(running_redis(None, directory))
        port = cleanup.enter_context(delayed(urlsplit(url).port or 6379, config.delay_ms))
        probe = StallProbe(model, config, url, f"redis://127.0.0.1:{port}/0")
        cleanup.callback(delete_namespace, url, probe.namespace)
        where = conditions(model, url)
        neighbours = Neighbours(url)
        with progress(console) as bar:
            # The first round runs like the others and is not counted.
            task = bar.add_task("rounds", total=config.rounds + 1)
            for index in range(config.rounds + 1):
                shift = index % len(RUNS)
                for name, gaps in probe.round([*RUNS[shift:], *RUNS[:shift]]).items():
                    if index:
                        samples[f"gap_p50_ms_{name}"].append(statistics.median(gaps))
                        samples[f"gap_p99_ms_{name}"].append(p99(gaps))
                        samples[f"gap_max_ms_{name}"].append(max(gaps))
                bar.advance(task)
        return Report(
            benchmark="redis_stall",
            **where,
            rounds=config.rounds,
            settings=config.model_dump(mode="json", exclude={"out", "engine", "rounds"})
            | {
                "max_running": config.engine.max_running,
                "cache": probe.settings.model_dump(mode="json", exclude={"remote": {"redis_url"}}),
            },
            figures=figures_of(samples) | {"neighbours_busy_percent": round(neighbours.busy_percent(), 2)},
            samples={name: [round(value, 4) for value in values] for name, values in samples.items()},
        )


def show(report: Report, console: Console) -> None:
    """Print the gaps of each run, and the ratios."""
    figures = report.figures
    table = Table("run", "gap p50\nms", "p99\nms", "longest\nms")
    for name in RUNS:
        row = [f"{figures[f'{kind}_{name}']:.1f}" for kind in ("gap_p50_ms", "gap_p99_ms", "gap_max_ms")]
        table.add_row(name.replace("_", " "), *row)
    console.print(table)
    console.print(
        f"p99 over that without a cache: {figures['gap_p99_over_no_cache']:.2f} with no prompt in Redis, "
        f"{figures['gap_p99_over_no_cache_known']:.2f} with all prompts in Redis; others kept "
        f"{figures['neighbours_busy_percent']:.0f} % of the cores busy"
    )


def _request(name: str, prompt: list[int], output_tokens: int) -> Request:
    return Request(
        request_id=name,
        session_id="benchmark",
        user_id="benchmark",
        max_new_tokens=output_tokens,
        created_at_ms=0.0,
        prompt_token_ids=tuple(prompt),
    )


def main() -> None:
    config = stated(
        RedisStallConfig,
        "benchmarks.redis_stall",
        "What a slow Redis costs running requests.",
        {"max_running": 2 * RedisStallConfig.model_fields["running"].default},
    )
    carry_out(config, measure, show)


if __name__ == "__main__":
    exit_on_user_error(main)

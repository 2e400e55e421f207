"""What int8 chunks in Redis save, and how far they change the model's logits.

    python -m benchmarks.int8_chunks --threads 1

Each round takes a new prompt, stores its chunks in Redis with both codecs, and fetches them by caches without a local
tier. Then four rows decode the same further tokens side by side. `recomputed` has the prefilled prompt; `raw` and
`int8` have the chunks from Redis. `chained` stands for a prompt that grows by one chunk per request: each chunk is
computed over int8 ones. At each token the logits of the last three rows are compared with those of the first:
differences over the standard deviation of the logits, KL divergence, and equality of the best token. `raw` shows the
error of the measurement itself.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from uuid import uuid4

import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table

from benchmarks.command import carry_out, progress, stated
from benchmarks.kv_reuse import BenchmarkEngine
from benchmarks.raw_redis import delete_namespace, running_redis
from benchmarks.report import Neighbours, Report, conditions, ratios, spread
from benchmarks.reuse_probe import FLUSH_TIMEOUT_S, SteadyClock, WrongMeasurementError
from cache.codec import decode, encode, record_bytes
from cache.config import CacheConfig, RemoteCodec, RemoteConfig, SizingConfig
from cache.manager import TwoLevelCache, open_cache
from core.config import Config
from core.errors import UserError, exit_on_user_error
from core.machine import usable_cores
from core.redis_config import RedisUrl
from inference_service.active_sequence import Piece
from inference_service.model import LoadedModel
from inference_service.transformers_engine import load_checked_model

ROWS = ("recomputed", "raw", "int8", "chained")
"""Rows of the measurement. The others are compared with the first."""
DRIFTS = ("max_drift", "mean_drift", "kl", "same_best")
SPEED_CHUNKS = 4
"""Number of chunks whose encoding and decoding each round measures. A prompt has at least as many."""
_NO_NAME = bytes(32)
"""Fingerprint and hash of a record that no cache looks up."""


class Int8Config(Config):
    """The prompts, and how often they are measured."""

    out: Path = Field(default=Path("results/benchmarks/int8_chunks.json"), description="path of the report")
    prompts: int = Field(default=8, ge=1, description="measured prompts, after one to warm up")
    prompt_tokens: int = Field(default=1024, ge=1, description="length of each in tokens: full chunks")
    positions: int = Field(default=64, ge=1, description="tokens after each prompt at which logits are compared")
    redis_url: RedisUrl | None = Field(
        default=None, description="redis://host:port of your own Redis; none: one is started"
    )
    seed: int = Field(default=0, ge=0, description="random seed of the tokens")
    engine: BenchmarkEngine = BenchmarkEngine()


def drift(exact: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Differences of the logits `other` from `exact`, both `[vocabulary]`, over the standard deviation of `exact`."""
    exact, other = exact.double(), other.double()
    differences = (other - exact).abs() / exact.std()
    log_p, log_q = exact.log_softmax(0), other.log_softmax(0)
    divergence = float((log_p.exp() * (log_p - log_q)).sum())
    same_best = float(exact.argmax() == other.argmax())
    # For equal distributions, rounding can give a negative divergence.
    return dict(
        zip(DRIFTS, (float(differences.max()), float(differences.mean()), max(divergence, 0.0), same_best), strict=True)
    )


class Int8Probe:
    """One model over a pool with one row for each of `ROWS`, and one cache per codec on the same Redis."""

    def __init__(self, model: LoadedModel, redis_url: str, seed: int) -> None:
        self._model = model
        self.chunk_tokens = CacheConfig().chunk_tokens
        self.shape = model.chunk_shape(self.chunk_tokens)
        self.namespace = f"int8-chunks-{uuid4().hex[:8]}"
        self._runner = model.make_runner(len(ROWS), self.chunk_tokens)
        self._tokens = torch.Generator().manual_seed(seed)
        self._redis_url = redis_url
        self._caches = {codec: self._cache(codec) for codec in RemoteCodec}

    def close(self) -> None:
        for cache in self._caches.values():
            cache.close()

    def round(self, prompt_tokens: int, positions: int, raw_first: bool) -> dict[str, list[float]]:
        """Measure one new prompt: times in ms to fetch it, codec speeds in MB/s, drifts at each position."""
        prompt, rest = self._drawn(prompt_tokens), self._drawn(positions)
        self._runner.forward([Piece(ROWS.index("recomputed"), 0, prompt)])
        taken: dict[str, list[float]] = defaultdict(list)
        for codec in sorted(RemoteCodec, reverse=raw_first):
            self._store(codec, prompt)
            taken[f"fetch_ms_{codec}"].append(self._fetch(codec, prompt))
        for codec in RemoteCodec:
            for name, speed in self._speeds(codec).items():
                taken[f"{name}_{codec}"].append(speed)
        self._chain(prompt)
        for index, token in enumerate(rest):
            logits = self._runner.forward([Piece(row, prompt_tokens + index, [token]) for row in range(len(ROWS))])
            for row, name in enumerate(ROWS[1:], start=1):
                for measure, value in drift(logits[0], logits[row]).items():
                    taken[f"{measure}_{name}"].append(value)
        return taken

    def _store(self, codec: RemoteCodec, prompt: list[int]) -> None:
        cache = self._caches[codec]
        cache.store(prompt, partial(self._runner.pool.read_chunk, ROWS.index("recomputed")))
        _require(cache.flush(FLUSH_TIMEOUT_S), "Redis did not take all chunks in time")
        _require(cache.stats().write_dropped == 0, "chunks were dropped on their way to Redis")

    def _fetch(self, codec: RemoteCodec, prompt: list[int]) -> float:
        """Load the prompt's chunks from Redis into the row of `codec`; return milliseconds of the lookup alone."""
        cache, chunks = self._caches[codec], len(prompt) // self.chunk_tokens
        before = cache.stats().bytes_read
        began_s = time.perf_counter()
        prefix = cache.fetch_and_lookup(prompt)
        took_ms = (time.perf_counter() - began_s) * 1000
        with prefix:
            _require(prefix.remote_chunks == chunks, f"{prefix.remote_chunks} of {chunks} chunks came from Redis")
            for index, chunk in enumerate(prefix.chunks):
                self._runner.pool.load_chunk(ROWS.index(codec), index, chunk)
            self._model.wait_for_device()
        moved = cache.stats().bytes_read - before
        _require(moved == chunks * record_bytes(self.shape, codec), "Redis moved another number of bytes")
        return took_ms

    def _chain(self, prompt: list[int]) -> None:
        """Fill the last row chunk by chunk, each computed over the int8 versions of those before it."""
        row, pool = ROWS.index("chained"), self._runner.pool
        for index in range(len(prompt) // self.chunk_tokens):
            start = index * self.chunk_tokens
            self._runner.forward([Piece(row, start, prompt[start : start + self.chunk_tokens])])
            record = encode(self._chunk(row, index), self.shape, _NO_NAME, _NO_NAME, RemoteCodec.INT8)
            pool.load_chunk(row, index, decode(bytearray(record), self.shape, _NO_NAME, _NO_NAME, RemoteCodec.INT8))
            self._model.wait_for_device()

    def _speeds(self, codec: RemoteCodec) -> dict[str, float]:
        """MB/s of tensors to records and back, checksums included; raw records are read by a copy."""
        chunks = [self._chunk(ROWS.index("recomputed"), index) for index in range(SPEED_CHUNKS)]
        began_s = time.perf_counter()
        records = [encode(chunk, self.shape, _NO_NAME, _NO_NAME, codec) for chunk in chunks]
        encode_s = time.perf_counter() - began_s
        arrived = [bytearray(record) for record in records]
        began_s = time.perf_counter()
        for record in arrived:
            chunk = decode(record, self.shape, _NO_NAME, _NO_NAME, codec)
            if codec is RemoteCodec.RAW:
                chunk.clone()
        decode_s = time.perf_counter() - began_s
        megabytes = SPEED_CHUNKS * self.shape.size_bytes / 1e6
        return {"encode_mb_per_s": megabytes / encode_s, "decode_mb_per_s": megabytes / decode_s}

    def _chunk(self, row: int, index: int) -> torch.Tensor:
        chunk = torch.empty(self.shape.size, dtype=self.shape.dtype)
        self._runner.pool.read_chunk(row, index, chunk)
        return chunk

    def _cache(self, codec: RemoteCodec) -> TwoLevelCache:
        config = CacheConfig(
            sizing=SizingConfig(capacity_chunks=0),
            remote=RemoteConfig(
                redis_url=self._redis_url,
                redis_namespace=self.namespace,
                remote_codec=codec,
                remote_deadline_ms=10_000,
                write_queue_bytes=1 << 30,
            ),
        )
        return open_cache(config, self.shape, self._model.identity, SteadyClock())

    def _drawn(self, tokens: int) -> list[int]:
        drawn: list[int] = torch.randint(0, self._model.vocab_size, (tokens,), generator=self._tokens).tolist()
        return drawn


def figures_of(probe: Int8Probe, samples: dict[str, list[float]]) -> dict[str, float]:
    """Figures of the report: drifts over all positions; times and speeds as medians with quartiles."""
    figures: dict[str, float] = {}
    for name in ROWS[1:]:
        greatest, mean, divergence, same_best = (samples[f"{measure}_{name}"] for measure in DRIFTS)
        figures |= {
            f"max_drift_{name}": max(greatest),
            f"mean_drift_{name}": statistics.mean(mean),
            f"kl_mean_{name}": statistics.mean(divergence),
            f"kl_max_{name}": max(divergence),
            f"same_best_percent_{name}": 100 * statistics.mean(same_best),
        }
    for codec in RemoteCodec:
        figures[f"record_bytes_{codec}"] = record_bytes(probe.shape, codec)
        for name in ("fetch_ms", "encode_mb_per_s", "decode_mb_per_s"):
            figures |= spread(f"{name}_{codec}", samples[f"{name}_{codec}"])
    figures["record_bytes_ratio"] = figures["record_bytes_int8"] / figures["record_bytes_raw"]
    figures |= spread("fetch_ratio", ratios(samples["fetch_ms_int8"], samples["fetch_ms_raw"]))
    return figures


def measure(config: Int8Config, console: Console) -> Report:
    """Run everything. Raises `UserError`, and `WrongMeasurementError` if a measurement is not what it claims."""
    chunk_tokens = CacheConfig().chunk_tokens
    if config.prompt_tokens % chunk_tokens or config.prompt_tokens < SPEED_CHUNKS * chunk_tokens:
        raise UserError(
            f"--prompt-tokens: {config.prompt_tokens} is not a multiple of the {chunk_tokens} tokens of a chunk, "
            f"{SPEED_CHUNKS} at least; change it"
        )
    torch.set_num_threads(config.engine.threads or usable_cores())
    model = load_checked_model(config.engine)
    if config.prompt_tokens + config.positions > model.max_len:
        raise UserError(
            f"--prompt-tokens: together with --positions above the model's {model.max_len} tokens; give fewer"
        )
    samples: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as cleanup:
        directory = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="int8-chunks-")))
        url = cleanup.enter_context(running_redis(config.redis_url, directory))
        probe = Int8Probe(model, url, config.seed)
        cleanup.callback(delete_namespace, url, probe.namespace)
        cleanup.callback(probe.close)
        where = conditions(model, url)
        neighbours = Neighbours(url)
        with progress(console) as bar:
            # The first round runs like the others and is not counted.
            task = bar.add_task("prompts", total=config.prompts + 1)
            for index in range(config.prompts + 1):
                taken = probe.round(config.prompt_tokens, config.positions, raw_first=index % 2 == 0)
                for name, values in taken.items():
                    if index > 0:
                        samples[name] += values
                bar.advance(task)
        busy = {"neighbours_busy_percent": neighbours.busy_percent()}
        return Report(
            benchmark="int8_chunks",
            **where,
            rounds=config.prompts,
            settings={
                "weights": "random" if config.engine.model == "default" else "the model's",
                "prompt_tokens": config.prompt_tokens,
                "positions": config.positions,
                "seed": config.seed,
                "chunk_tokens": probe.chunk_tokens,
                "redis": "started for this run" if config.redis_url is None else "the user's",
            },
            figures={name: _rounded(value) for name, value in (figures_of(probe, samples) | busy).items()},
            samples={name: [_rounded(value) for value in values] for name, values in samples.items()},
        )


def show(report: Report, console: Console) -> None:
    """Print the main figures as tables."""
    figures = report.figures
    table = Table(
        "chunks", "max drift\nstd of logits", "mean drift\nstd of logits", "KL mean\nnat", "KL max\nnat", "best\nsame %"
    )
    for name in ROWS[1:]:
        measures = ("max_drift", "mean_drift", "kl_mean", "kl_max", "same_best_percent")
        table.add_row(name, *(f"{figures[f'{measure}_{name}']:.3g}" for measure in measures))
    console.print(table)
    table = Table("codec", "record\nbytes", "fetch\nms", "encode\nMB/s", "decode\nMB/s")
    for codec in RemoteCodec:
        columns = ("record_bytes", "fetch_ms", "encode_mb_per_s", "decode_mb_per_s")
        table.add_row(codec.value, *(f"{figures[f'{measure}_{codec}']:.5g}" for measure in columns))
    console.print(table)
    console.print(
        f"int8 over raw: {figures['record_bytes_ratio']:.3f} of the bytes, {figures['fetch_ratio']:.2f} of the time to "
        f"fetch (quartiles {figures['fetch_ratio_p25']:.2f} and {figures['fetch_ratio_p75']:.2f}); weights: "
        f"{report.settings['weights']}; others kept {figures['neighbours_busy_percent']:.0f} % of the cores busy"
    )


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise WrongMeasurementError(otherwise)


def main() -> None:
    config = stated(
        Int8Config, "benchmarks.int8_chunks", "What int8 chunks in Redis save, and how far they change logits."
    )
    carry_out(config, measure, show)


if __name__ == "__main__":
    exit_on_user_error(main)

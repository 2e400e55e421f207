"""`python -m benchmarks.chunk_seals`: cost of authenticating chunks in Redis, compared with a checksum.

Each round measures both seals, one after the other: the seal of one chunk, and a lookup that fetches chunks from a
Redis on this machine. Here the transfer is fastest, so the seal's share is greatest.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from pydantic import Field, SecretStr
from rich.console import Console
from rich.table import Table

from benchmarks.command import carry_out, progress, stated
from benchmarks.raw_redis import delete_namespace, running_redis
from benchmarks.report import Neighbours, Report, conditions_of, ratios, spread
from cache.config import CacheConfig, RemoteConfig, SizingConfig
from cache.manager import TwoLevelCache, open_cache
from cache.payload import payload_view
from cache.protocol import ChunkShape, ModelIdentity
from cache.seal import CHECKSUM, Authentication, Seal
from core.clock import SystemClock
from core.config import Config
from core.errors import UserError
from core.redis_config import RedisUrl

CHUNK_TOKENS = 32
SHAPES = {
    "30M-float32": ChunkShape(8, 2, CHUNK_TOKENS, 64, torch.float32),
    "0.5B-bfloat16": ChunkShape(24, 2, CHUNK_TOKENS, 64, torch.bfloat16),
    "8B-bfloat16": ChunkShape(32, 8, CHUNK_TOKENS, 128, torch.bfloat16),
}
"""Chunks of models of three sizes."""
NAMESPACE = "chunk-seals"
KEY = "the key of a benchmark, which is no secret"
FIELDS = bytes(112)


class ChunkSealsConfig(Config):
    """The lookups, and how often they are measured."""

    out: Path = Field(default=Path("results/benchmarks/chunk_seals.json"), description="path of the report")
    rounds: int = Field(default=40, ge=1, description="measured rounds of each size, after one to warm up")
    chunks: int = Field(default=16, ge=1, description="chunks that one lookup fetches")
    redis_url: RedisUrl | None = Field(
        default=None, description="redis://host:port of your own Redis; none: one is started"
    )


class SealProbe:
    """Two caches of one shape on one Redis with the same prompt, one of them with a key."""

    def __init__(self, shape: ChunkShape, chunks: int, url: str, key_file: Path) -> None:
        self._chunk = torch.randn(shape.size, generator=torch.Generator().manual_seed(0)).to(shape.dtype)
        self._prompt = list(range(chunks * shape.chunk_tokens))
        self._chunks = chunks
        self._seals: dict[str, Seal] = {"checksum": CHECKSUM, "authentication": Authentication(SecretStr(KEY))}
        self._caches = {
            name: _open(shape, url, file) for name, file in (("checksum", None), ("authentication", key_file))
        }
        for cache in self._caches.values():
            cache.store(self._prompt, self._read_chunk)
            if not cache.flush(60):
                raise UserError("redis_url: Redis takes no chunks; check its free memory")

    def round(self, checksum_first: bool) -> dict[str, float]:
        """Milliseconds of one seal and of one lookup, with the checksum and with the key."""
        names = list(self._seals) if checksum_first else list(reversed(self._seals))
        payload = payload_view(self._chunk)
        taken = {f"seal_ms_{name}": _timed_ms(partial(self._seals[name].of, FIELDS, payload)) for name in names}
        return taken | {f"fetch_ms_{name}": _timed_ms(partial(self._fetch, self._caches[name])) for name in names}

    def close(self) -> None:
        for cache in self._caches.values():
            cache.close()

    def _read_chunk(self, index: int, out: torch.Tensor) -> None:
        out.copy_(self._chunk)

    def _fetch(self, cache: TwoLevelCache) -> None:
        with cache.fetch_and_lookup(self._prompt) as prefix:
            if prefix.remote_chunks != self._chunks:
                raise RuntimeError(f"{prefix.remote_chunks} of {self._chunks} chunks came from Redis")


def _open(shape: ChunkShape, url: str, key_file: Path | None) -> TwoLevelCache:
    """Open a cache without a local tier, so that every lookup goes to Redis."""
    config = CacheConfig(
        chunk_tokens=shape.chunk_tokens,
        sizing=SizingConfig(capacity_chunks=0, min_capacity_chunks=0),
        remote=RemoteConfig(
            redis_url=url,
            redis_namespace=NAMESPACE,
            remote_deadline_ms=30_000,
            write_queue_bytes=1 << 30,
            chunk_key_file=key_file,
        ),
    )
    return open_cache(config, shape, ModelIdentity(str(shape), "none", "none"), SystemClock())


def _timed_ms(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return (time.perf_counter() - began_s) * 1000


def figures_of(samples: dict[str, list[float]]) -> dict[str, float]:
    """Medians in ms and ratios taken round by round for each shape, with quartiles."""
    figures: dict[str, float] = {}
    for shape, chunk in SHAPES.items():
        for what in ("seal", "fetch"):
            both = [samples[f"{what}_ms_{name}_{shape}"] for name in ("authentication", "checksum")]
            figures |= spread(f"{what}_ratio_{shape}", ratios(*both))
            figures |= spread(f"{what}_ms_authentication_{shape}", both[0])
            figures |= spread(f"{what}_ms_checksum_{shape}", both[1])
        figures[f"chunk_bytes_{shape}"] = chunk.size_bytes
    return {name: round(value, 4) for name, value in figures.items()}


def measure(config: ChunkSealsConfig, console: Console) -> Report:
    torch.set_num_threads(1)
    samples: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as cleanup:
        directory = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="chunk-seals-")))
        url = cleanup.enter_context(running_redis(config.redis_url, directory))
        cleanup.callback(delete_namespace, url, NAMESPACE)
        where = conditions_of({"threads": 1}, {}, url)
        key_file = directory / "chunk.key"
        key_file.touch(mode=0o600)
        key_file.write_text(KEY)
        neighbours = Neighbours(url)
        bar = cleanup.enter_context(progress(console))
        task = bar.add_task("rounds", total=(config.rounds + 1) * len(SHAPES))
        for shape_name, shape in SHAPES.items():
            probe = SealProbe(shape, config.chunks, url, key_file)
            cleanup.callback(probe.close)
            # The first round runs like the others and is not counted.
            for index in range(config.rounds + 1):
                taken = probe.round(checksum_first=index % 2 == 0)
                for name, value in taken.items() if index else ():
                    samples[f"{name}_{shape_name}"].append(round(value, 4))
                bar.advance(task)
        return Report(
            benchmark="chunk_seals",
            **where,
            rounds=config.rounds,
            settings={"chunks": config.chunks, "redis": "started" if config.redis_url is None else "the user's"},
            figures=figures_of(samples) | {"neighbours_busy_percent": round(neighbours.busy_percent(), 2)},
            samples=dict(samples),
        )


def show(report: Report, console: Console) -> None:
    """Print the main figures as a table."""
    table = Table("chunk", "MiB", "xxh3-128\nms", "HMAC\nms", "\nx", "look-up of all\nms", "with HMAC\nms", "\nx")
    for shape in SHAPES:
        row = [f"{report.figures[f'chunk_bytes_{shape}'] / (1 << 20):.2f}"]
        for what in ("seal", "fetch"):
            names = (f"{what}_ms_checksum_{shape}", f"{what}_ms_authentication_{shape}", f"{what}_ratio_{shape}")
            row += [f"{report.figures[name]:.3f}" for name in names]
        table.add_row(shape, *row)
    console.print(table)
    console.print(f"others kept {report.figures['neighbours_busy_percent']:.0f} % of the cores busy")


def main() -> None:
    carry_out(stated(ChunkSealsConfig, "benchmarks.chunk_seals", (__doc__ or "").splitlines()[0]), measure, show)


if __name__ == "__main__":
    main()

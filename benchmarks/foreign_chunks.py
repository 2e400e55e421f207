"""`python -m benchmarks.foreign_chunks`: does a cache ever return another tenant's or another model's chunk?

Tenants look up the same few prompts with several models, which differ as little as possible. Half of the pairs of
tenant and model never store anything. All caches share one Redis and namespace. Every chunk is stamped with its model,
tenant and tokens, and every returned chunk is compared with the right stamp, bit by bit. A hit is also foreign if its
tenant and model stored nothing.
"""

import hashlib
import random
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from pydantic import Field
from redis import Redis
from rich.console import Console

from benchmarks.command import carry_out, progress, stated
from benchmarks.raw_redis import delete_namespace, running_redis
from benchmarks.report import Report, conditions_of
from cache.config import CacheConfig, RemoteConfig, SizingConfig
from cache.manager import TwoLevelCache, open_cache
from cache.protocol import ChunkShape, ModelIdentity
from core.clients import redis_settings
from core.clock import SystemClock
from core.config import Config
from core.redis_config import RedisUrl

SHAPE = ChunkShape(layers=1, kv_heads=1, chunk_tokens=2, head_dim=4, dtype=torch.float32)
LONGEST_PROMPT_CHUNKS = 5
PROMPTS = 64
CAPACITY_CHUNKS = 64
"""Capacity of a local tier. It is far below what the tenants use, so that chunks are evicted all the time."""
CACHES_OF_A_WORLD = 2
FORGET_EVERY = 2000
"""Number of lookups after which Redis loses a third of its chunks, so that there are always misses."""
NAMESPACE = "foreign-chunks"

SALTS = ("", "a", "A", "b", "ab", "a ", " a", "a\x00", "\x00a", "ä", "a\u0308", "4:salt")
"""Tenants with names as similar as possible; two of them look the same."""

_BASE = ModelIdentity(weights_digest="w", tokenizer_digest="t", settings="s")
MODELS = (
    _BASE,
    replace(_BASE, weights_digest="other"),
    replace(_BASE, tokenizer_digest="other"),
    replace(_BASE, settings="other"),
    replace(_BASE, adapter="other"),
    # Its concatenated fields equal those of the first.
    replace(_BASE, weights_digest="wt", tokenizer_digest=""),
)


@dataclass(frozen=True)
class World:
    """Caches that may share chunks: they have the same model, and the same key or none."""

    model: ModelIdentity
    authenticated: bool = False


WORLDS = (*(World(model) for model in MODELS), World(_BASE, authenticated=True))


class ForeignChunksConfig(Config):
    """Number of lookups, and the Redis."""

    out: Path = Field(default=Path("results/benchmarks/foreign_chunks.json"), description="path of the report")
    lookups: int = Field(default=1_000_000, ge=1, description="total number of lookups")
    redis_url: RedisUrl | None = Field(
        default=None, description="redis://host:port of your own Redis; none: one is started"
    )
    seed: int = Field(default=0, ge=0, description="random seed of tenants, prompts and caches")


@dataclass
class Counts:
    """Counts of the trial."""

    lookups: int = 0
    lookups_of_nothing: int = 0
    """Lookups by a tenant that has never stored anything with that model."""
    local_chunks: int = 0
    remote_chunks: int = 0
    foreign_chunks: int = 0
    chunks_stored: int = 0


@dataclass
class ChunkTrial:
    """Caches of all worlds on one Redis, and counts of the chunks they returned."""

    caches: Sequence[tuple[int, TwoLevelCache]]
    """Each cache with the position of its world."""
    seed: int
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        # Few different chunks: prompts have common beginnings, so one tenant's lookups match another's chunks.
        self._prompts = [
            [token for _ in range(self._random.randint(1, LONGEST_PROMPT_CHUNKS)) for token in self._chunk()]
            for _ in range(PROMPTS)
        ]
        self._stamps: dict[tuple[int, int, bytes], bytes] = {}

    def look_up(self) -> None:
        """Look up one prompt of one tenant in one cache, and perhaps store the missing chunks."""
        world, cache = self._random.choice(self.caches)
        tenant, prompt = self._random.randrange(len(SALTS)), self._random.choice(self._prompts)
        stores = (world + tenant) % 2 == 0
        self.counts.lookups += 1
        self.counts.lookups_of_nothing += not stores
        with cache.fetch_and_lookup(prompt, SALTS[tenant]) as prefix:
            self.counts.local_chunks += prefix.local_chunks
            self.counts.remote_chunks += prefix.remote_chunks
            for index, chunk in enumerate(prefix.chunks):
                right = self._stamp(world, tenant, prompt, index)
                self.counts.foreign_chunks += not stores or bytes(chunk.view(-1).numpy()) != right
            missing = len(prefix.chunks) * SHAPE.chunk_tokens < len(prompt)
        if stores and missing:

            def read_chunk(index: int, out: torch.Tensor) -> None:
                stamp = bytearray(self._stamp(world, tenant, prompt, index))
                out.copy_(torch.frombuffer(stamp, dtype=SHAPE.dtype).view(SHAPE.size))

            self.counts.chunks_stored += cache.store(prompt, read_chunk, SALTS[tenant])

    def _chunk(self) -> list[int]:
        return [self._random.randrange(2) for _ in range(SHAPE.chunk_tokens)]

    def _stamp(self, world: int, tenant: int, prompt: list[int], index: int) -> bytes:
        """Return the only right content of a chunk."""
        about = (world, tenant, bytes(prompt[: (index + 1) * SHAPE.chunk_tokens]))
        if about not in self._stamps:
            self._stamps[about] = hashlib.blake2b(repr(about).encode(), digest_size=SHAPE.size_bytes).digest()
        return self._stamps[about]


def try_all(config: ForeignChunksConfig, url: str, directory: Path, console: Console) -> ChunkTrial:
    """Do `config.lookups` lookups."""
    key_file = directory / "chunk.key"
    key_file.touch(mode=0o600)
    key_file.write_text(hashlib.sha256(str(config.seed).encode()).hexdigest())
    forgetful = random.Random(config.seed)
    with ExitStack() as opened:
        client = opened.enter_context(Redis.from_url(url, **redis_settings(url)))
        caches = []
        for position, world in enumerate(WORLDS):
            for _ in range(CACHES_OF_A_WORLD):
                cache = _open(world, url, key_file)
                opened.callback(cache.close)
                caches.append((position, cache))
        opened.callback(delete_namespace, url, NAMESPACE)
        trial = ChunkTrial(caches, config.seed)
        bar = opened.enter_context(progress(console))
        task = bar.add_task("look-ups", total=config.lookups)
        for number in range(config.lookups):
            if number % FORGET_EVERY == FORGET_EVERY - 1:
                client.unlink(*(key for key in client.keys(f"{NAMESPACE}:*") if forgetful.random() < 1 / 3))
                bar.update(task, completed=number)
            trial.look_up()
    return trial


def _open(world: World, url: str, key_file: Path) -> TwoLevelCache:
    config = CacheConfig(
        chunk_tokens=SHAPE.chunk_tokens,
        sizing=SizingConfig(capacity_chunks=CAPACITY_CHUNKS),
        remote=RemoteConfig(
            redis_url=url,
            redis_namespace=NAMESPACE,
            remote_deadline_ms=10_000,
            chunk_key_file=key_file if world.authenticated else None,
        ),
    )
    return open_cache(config, SHAPE, world.model, SystemClock())


def measure(config: ForeignChunksConfig, console: Console) -> Report:
    with ExitStack() as cleanup:
        directory = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="foreign-chunks-")))
        url = cleanup.enter_context(running_redis(config.redis_url, directory))
        where = conditions_of({}, {}, url)
        trial = try_all(config, url, directory, console)
    stats = [cache.stats() for _, cache in trial.caches]
    return Report(
        benchmark="foreign_chunks",
        **where,
        rounds=1,
        settings={
            "seed": config.seed,
            "tenants": len(SALTS),
            "models": len(MODELS),
            "worlds": len(WORLDS),
            "caches": len(trial.caches),
            "prompts": PROMPTS,
            "capacity_chunks": CAPACITY_CHUNKS,
        },
        figures={name: float(count) for name, count in vars(trial.counts).items()}
        | {
            "evictions": float(sum(one.evictions for one in stats)),
            "remote_corrupt": float(sum(one.remote_corrupt for one in stats)),
            "remote_errors": float(sum(one.remote_errors + one.remote_timeouts for one in stats)),
        },
        samples={},
    )


def show(report: Report, console: Console) -> None:
    figures = {name: f"{int(value):,}" for name, value in report.figures.items()}
    console.print(
        f"{figures['lookups']} lookups by {report.settings['tenants']} tenants in {report.settings['caches']} caches "
        f"found {figures['local_chunks']} chunks in the local tiers and {figures['remote_chunks']} in Redis; "
        f"foreign: {figures['foreign_chunks']}"
    )


def main() -> None:
    config = stated(ForeignChunksConfig, "benchmarks.foreign_chunks", (__doc__ or "").splitlines()[0])
    report = carry_out(config, measure, show)
    sys.exit(1 if report.figures["foreign_chunks"] else 0)


if __name__ == "__main__":
    main()

"""What reuse of key/value chunks saves, how close Redis is to its lower bound, and what the cache costs without reuse.

    python -m benchmarks.kv_reuse --out results/benchmarks/kv_reuse.json

Each round takes a new prompt and measures its time to the first token (TTFT, from submission to an idle engine) in
three ways: recomputed, reused from the local tier, and reused from Redis, by a cache with an empty local tier and an
open connection. There are two lower bounds. The recomputed prompt is compared with one forward pass over all of it.
Reuse from Redis is compared with the same records over a bare socket, plus the prefill of the one token that reuse
leaves. Then whole requests with unique prompts run in pairs, without and with the cache. With the cache, the clock
stops when the last chunk has reached Redis. Every answer and every count of reused tokens is checked; a wrong one ends
the run.
"""

import tempfile
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BeforeValidator, Field
from rich.console import Console
from rich.table import Table

from benchmarks.command import carry_out, progress, stated
from benchmarks.raw_redis import delete_namespace, running_redis
from benchmarks.report import Neighbours, Report, conditions, median_noise, ratios, spread
from benchmarks.reuse_probe import TTFTS, ReuseProbe, held_tokens
from cache.config import CacheConfig
from core.config import Config
from core.errors import UserError, exit_on_user_error
from core.machine import usable_cores
from core.redis_config import RedisUrl
from inference_service.config import EngineConfig
from inference_service.transformers_engine import load_checked_model


def _numbers(text: object) -> object:
    return text.split(",") if isinstance(text, str) else text


class BenchmarkEngine(EngineConfig):
    """The model, and one row to run it in."""

    max_running: int = Field(default=1, ge=1, le=1, description="one request at a time is measured")
    max_model_len: int = Field(default=4096, ge=2, description="longest sequence, prompt and answer, in tokens")


class KvReuseConfig(Config):
    """The prompts, and how often they are measured."""

    out: Path = Field(default=Path("results/benchmarks/kv_reuse.json"), description="path of the report")
    rounds: int = Field(default=7, ge=1, description="measured rounds of each prompt length, after one to warm up")
    prompts: Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_numbers)] = Field(
        default=(256, 1024, 2048), min_length=1, description="prompt lengths in tokens, as 256,1024: full chunks"
    )
    pairs: int = Field(default=40, ge=1, description="pairs of whole requests of a unique prompt, cache off and on")
    unique_prompt_tokens: int = Field(default=1024, ge=1, description="prompt of such a request")
    unique_output_tokens: int = Field(default=64, ge=1, description="answer of such a request")
    redis_url: RedisUrl | None = Field(
        default=None, description="redis://host:port of your own Redis; none: one is started"
    )
    seed: int = Field(default=0, ge=0, description="random seed of the prompts")
    engine: BenchmarkEngine = BenchmarkEngine()


def figures_of(probe: ReuseProbe, config: KvReuseConfig, samples: dict[str, list[float]]) -> dict[str, float]:
    """Figures of the report: medians in ms, and ratios taken round by round, with quartiles."""
    figures: dict[str, float] = {}
    for length in config.prompts:
        recompute, local, redis = (samples[f"{name}_ttft_ms_{length}"] for name in TTFTS)
        transfer, prefill = (samples[f"floor_{part}_ms_{length}"] for part in ("transfer", "prefill"))
        floor = [sum(parts) for parts in zip(transfer, prefill, strict=True)]
        figures |= spread(f"local_speedup_{length}", ratios(recompute, local))
        figures |= spread(f"redis_speedup_{length}", ratios(recompute, redis))
        figures |= spread(f"redis_over_floor_{length}", ratios(redis, floor))
        unbroken = samples[f"unbroken_ms_{length}"]
        figures |= spread(f"recompute_over_unbroken_{length}", ratios(recompute, unbroken))
        figures |= spread(f"unbroken_ms_{length}", unbroken)
        for name in TTFTS:
            figures |= spread(f"{name}_ttft_ms_{length}", samples[f"{name}_ttft_ms_{length}"])
        figures |= spread(f"redis_floor_ms_{length}", floor)
        figures |= spread(f"floor_transfer_ms_{length}", transfer)
        figures |= spread(f"floor_prefill_ms_{length}", prefill)
        figures[f"moved_bytes_{length}"] = probe.moved_bytes(length)
    overheads = [100 * (ratio - 1) for ratio in ratios(samples["unique_on_ms"], samples["unique_off_ms"])]
    figures |= spread("no_reuse_overhead_percent", overheads)
    figures["no_reuse_overhead_noise_percent"] = median_noise(overheads)
    figures |= spread("no_reuse_off_ms", samples["unique_off_ms"])
    figures |= spread("no_reuse_on_ms", samples["unique_on_ms"])
    held = held_tokens(config.unique_prompt_tokens, config.unique_output_tokens)
    figures["no_reuse_written_bytes"] = probe.moved_bytes(held)
    return {name: round(value, 4) for name, value in figures.items()}


def measure(config: KvReuseConfig, console: Console) -> Report:
    """Run everything. Raises `UserError`, and `WrongMeasurementError` if a measurement is not what it claims."""
    chunk_tokens = CacheConfig().chunk_tokens
    if odd := [length for length in config.prompts if length % chunk_tokens or length < chunk_tokens]:
        raise UserError(f"--prompts: {odd[0]} is not a multiple of the {chunk_tokens} tokens of a chunk; change it")
    torch.set_num_threads(config.engine.threads or usable_cores())
    unique_tokens = config.unique_prompt_tokens + config.unique_output_tokens
    # Without end-of-sequence tokens every answer has the requested length.
    model = replace(load_checked_model(config.engine), eos_token_ids=frozenset())
    samples: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as cleanup:
        directory = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="kv-reuse-")))
        url = cleanup.enter_context(running_redis(config.redis_url, directory))
        probe = ReuseProbe(model, config.engine, url, max(*config.prompts, unique_tokens), config.seed)
        cleanup.callback(delete_namespace, url, probe.settings.remote.redis_namespace)
        cleanup.callback(probe.close)
        where = conditions(model, url)
        neighbours = Neighbours(url)
        with progress(console) as bar:
            # The first round runs like the others and is not counted.
            task = bar.add_task("time to first token", total=(config.rounds + 1) * len(config.prompts))
            for index in range(config.rounds + 1):
                for length in config.prompts:
                    _record(samples, probe.ttft_round(length), counted=index > 0)
                    bar.advance(task)
            task = bar.add_task("requests without reuse", total=config.pairs + 1)
            for index in range(config.pairs + 1):
                taken = probe.unique_pair(
                    config.unique_prompt_tokens, config.unique_output_tokens, cache_first=index % 2 == 0
                )
                _record(samples, taken, counted=index > 0)
                bar.advance(task)
        return Report(
            benchmark="kv_reuse",
            **where,
            rounds=config.rounds,
            settings={
                "prompts": config.prompts,
                "seed": config.seed,
                "max_model_len": model.max_len,
                "pairs": config.pairs,
                "unique_prompt_tokens": config.unique_prompt_tokens,
                "unique_output_tokens": config.unique_output_tokens,
                "redis": "started for this run" if config.redis_url is None else "the user's",
                "cache": probe.settings.model_dump(mode="json", exclude={"remote": {"redis_url"}}),
            },
            figures=figures_of(probe, config, samples)
            | {"neighbours_busy_percent": round(neighbours.busy_percent(), 2)},
            samples={name: [round(value, 4) for value in values] for name, values in samples.items()},
        )


def show(report: Report, console: Console) -> None:
    """Print the main figures as tables."""
    figures = report.figures
    table = Table(
        "prompt", "recompute\nms", "local\nms", "\nx", "Redis\nms", "\nx", "floor\nms", "Redis\n/ floor", "\nMiB"
    )
    for length in report.settings["prompts"]:
        row = [
            f"{figures[f'{name}_{length}']:.2f}"
            for name in (
                "recompute_ttft_ms",
                "local_ttft_ms",
                "local_speedup",
                "redis_ttft_ms",
                "redis_speedup",
                "redis_floor_ms",
                "redis_over_floor",
            )
        ]
        table.add_row(str(length), *row, f"{figures[f'moved_bytes_{length}'] / (1 << 20):.2f}")
    console.print(table)
    unbroken = (f"{figures[f'recompute_over_unbroken_{length}']:.2f}" for length in report.settings["prompts"])
    console.print(f"recomputed over one unbroken pass: {', '.join(unbroken)}")
    console.print(
        f"without reuse: {figures['no_reuse_off_ms']:.1f} ms off, {figures['no_reuse_on_ms']:.1f} ms on; overhead "
        f"{figures['no_reuse_overhead_percent']:.2f} % ± {figures['no_reuse_overhead_noise_percent']:.2f} "
        f"(quartiles {figures['no_reuse_overhead_percent_p25']:.2f} and "
        f"{figures['no_reuse_overhead_percent_p75']:.2f}); others kept {figures['neighbours_busy_percent']:.0f} % of "
        "the cores busy"
    )


def _record(samples: dict[str, list[float]], taken: dict[str, float], counted: bool) -> None:
    for name, value in taken.items():
        if counted:
            samples[name].append(value)


def main() -> None:
    config = stated(KvReuseConfig, "benchmarks.kv_reuse", "What reuse of key/value chunks saves and costs.")
    carry_out(config, measure, show)


if __name__ == "__main__":
    exit_on_user_error(main)

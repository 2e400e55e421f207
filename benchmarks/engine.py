"""Prefill and decode over our pool compared with the limits of the device; writes the device's profile.

    python -m benchmarks.engine --shape qwen2.5-0.5b,qwen2.5-7b --device cuda --dtype bfloat16

Each round measures, one after the other: the device's ceilings (matrix products, memory bandwidth), prefill at several
lengths, decode steps at several numbers of rows and contexts, and a prompt with reused chunks and recomputed. All
passes go through our pool and runner, with random weights in the shape of a real model. Ratios are taken round by
round. The parameters of a roofline are fitted to the medians and written as a device profile.

Needs only PyTorch and transformers, so it runs on a bare machine with a GPU.
"""

import argparse
import datetime
import json
import math
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from transformers import Qwen2Config

from benchmarks.ceilings import Ceilings, Fit, Work, fit, free_bytes, synchronize
from benchmarks.random_models import SHAPES, RandomModel, build, costs_of, make_runner, shape_bytes
from core.machine import usable_cores
from inference_service.active_sequence import Piece

ROOT = Path(__file__).resolve().parents[1]
PIECE_TOKENS = 256
"""The default of `step_prefill_tokens`: prompt tokens between two decode steps."""
LEAST_SAMPLE_S = 0.02
MOST_REPEATS = 20
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 6e-2}
"""Maximum difference of logits that rounding may cause, as a share of their largest magnitude."""


class UsageError(Exception):
    """The options are invalid. `str(error)` is one line that names the option and the fix."""


class ReuseMismatchError(Exception):
    """A measurement is not what its name says."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


@dataclass(frozen=True)
class Point:
    """One kind of forward pass: its name, how to run it, and the least work it needs."""

    name: str
    run: Callable[[], torch.Tensor]
    work: Work


class Probe:
    """All measurements of one shape. A round gives one sample of each."""

    def __init__(self, model: RandomModel, options: argparse.Namespace) -> None:
        self._model = model
        self._options = options
        self._chunk_tokens: int = options.chunk_tokens
        self.costs = costs_of(model.config, model.dtype)
        self._runner = make_runner(model, max(options.rows), longest_row(options), self._chunk_tokens)
        self._pool = self._runner.pool
        shape = self._pool.shape
        generator = torch.Generator().manual_seed(0)
        longest = max(*options.lengths, options.reuse_tokens)
        self._tokens: list[int] = torch.randint(0, model.config.vocab_size, (longest,), generator=generator).tolist()
        self._fill(torch.randn(shape.size, generator=generator).to(model.dtype))
        self._chunks = [torch.empty(shape.size, dtype=model.dtype) for _ in range(self._reuse_chunks)]
        self._check_reuse()
        read_bytes = int(self.costs.decode([min(options.contexts)]).moved_bytes)
        self.ceilings = Ceilings(model.device, model.dtype, self._products(), read_bytes)
        self.points = self._points()
        self._repeats: dict[str, int] = {}

    def round(self) -> dict[str, float]:
        """One sample of every measurement: rates of the ceilings, then times in ms."""
        taken = {f"flops_per_s_{name}": rate for name, rate in self.ceilings.flops_per_s().items()}
        taken |= {f"bytes_per_s_{name}": rate for name, rate in self.ceilings.bytes_per_s().items()}
        for point in self.points:
            taken[f"{point.name}_ms"] = self._ms(point.name, point.run)
        taken["reuse_load_ms"] = self._ms("reuse_load", self._load)
        return taken

    @property
    def _reuse_chunks(self) -> int:
        return int(self._options.reuse_tokens // self._chunk_tokens)

    def _points(self) -> list[Point]:
        options = self._options
        reuse = options.reuse_tokens
        points = [self._prefill_point(f"prefill_{length}", length, 0) for length in sorted({*options.lengths, reuse})]
        if reuse > PIECE_TOKENS:
            name = f"prefill_piece_{PIECE_TOKENS}_of_{reuse}"
            points.append(self._prefill_point(name, PIECE_TOKENS, reuse - PIECE_TOKENS))
        # If all chunks of a prompt are cached, only its last token is computed, for the answer's first token.
        points.append(self._prefill_point(f"prefill_last_of_{reuse}", 1, reuse - 1))
        for context in options.contexts:
            points += [self._decode_point(f"decode_{rows}x{context}", [context] * rows) for rows in options.rows]
        rows, short, long = max(options.rows), min(options.contexts), max(options.contexts)
        if rows > 1 and short < long:
            half = rows // 2
            points.append(self._decode_point(f"decode_{rows}xmixed", [short] * half + [long] * (rows - half)))
        return points

    def _prefill_point(self, name: str, tokens: int, start: int) -> Point:
        piece = self._tokens[start : start + tokens]
        run = partial(self._runner.forward, [Piece(0, start, piece)])
        return Point(name, run, self.costs.prefill(tokens, start))

    def _decode_point(self, name: str, lengths: list[int]) -> Point:
        pieces = [Piece(row, length, self._tokens[row : row + 1]) for row, length in enumerate(lengths)]
        run = partial(self._runner.forward, pieces)
        return Point(name, run, self.costs.decode(lengths))

    def _ms(self, name: str, run: Callable[[], object]) -> float:
        """Mean wall time of `run`. Each call waits for the device, as the engine does after every step."""
        repeats = self._repeats.get(name, 1)
        synchronize(self._model.device)
        began_s = time.perf_counter()
        for _ in range(repeats):
            run()
            synchronize(self._model.device)
        taken_s = (time.perf_counter() - began_s) / repeats
        # By the time of the warm-up: short calls are repeated until a sample is long against noise.
        self._repeats.setdefault(name, max(1, min(MOST_REPEATS, math.ceil(LEAST_SAMPLE_S / taken_s))))
        return 1e3 * taken_s

    def _products(self) -> list[tuple[int, int, int]]:
        """A square product, whose size is an option, and the model's widest product at the longest prompt."""
        config, square = self._model.config, self._options.square
        return [
            (square, square, square),
            (max(self._options.lengths), config.hidden_size, config.intermediate_size),
            (max(self._options.lengths), config.intermediate_size, config.hidden_size),
        ]

    def _fill(self, chunk: torch.Tensor) -> None:
        """Fill the rows with values other than zero: a device computes zeros in less time and power."""
        for row in range(self._pool.rows):
            for index in range(self._pool.max_len // self._chunk_tokens):
                self._pool.load_chunk(row, index, chunk)

    def _load(self) -> None:
        for index, chunk in enumerate(self._chunks):
            self._pool.load_chunk(0, index, chunk)

    def _check_reuse(self) -> None:
        """Check that reused chunks give the same logits as the recomputed prompt."""
        reuse = self._options.reuse_tokens
        computed = self._runner.forward([Piece(0, 0, self._tokens[:reuse])]).float().cpu()
        for index, chunk in enumerate(self._chunks):
            self._pool.read_chunk(0, index, chunk)
        self._fill(torch.ones_like(self._chunks[0]))
        self._load()
        reused = self._runner.forward([Piece(0, reuse - 1, self._tokens[reuse - 1 : reuse])]).float().cpu()
        difference = float((computed - reused).abs().max() / computed.abs().max())
        if not difference <= TOLERANCE[self._model.dtype]:
            raise ReuseMismatchError(f"reuse and recompute of {reuse} tokens differ by {difference:.2g}")


def longest_row(options: argparse.Namespace) -> int:
    """Length of the longest measured sequence, in full chunks."""
    longest = max(*options.lengths, options.reuse_tokens, *(context + 1 for context in options.contexts))
    return int(math.ceil(longest / options.chunk_tokens) * options.chunk_tokens)


def figures_of(probe: Probe, samples: dict[str, list[float]], options: argparse.Namespace) -> dict[str, float]:
    """Figures of one shape: medians, and ratios taken round by round."""
    median = {name: statistics.median(values) for name, values in samples.items()}
    ceilings = {
        kind: [max(rates) for rates in zip(*(v for n, v in samples.items() if n.startswith(kind)), strict=True)]
        for kind in ("flops_per_s", "bytes_per_s")
    }
    longest, context, reuse = max(options.lengths), min(options.contexts), options.reuse_tokens
    points = {point.name: point for point in probe.points}
    figures = {f"ceiling_{kind}": statistics.median(rates) for kind, rates in ceilings.items()}

    step = points[f"decode_{min(options.rows)}x{context}"]
    floors = [step.work.moved_bytes / rate for rate in ceilings["bytes_per_s"]]
    figures["decode_over_bandwidth_floor"] = _median_ratio(samples[f"{step.name}_ms"], floors)
    prompt = points[f"prefill_{longest}"]
    floors = [prompt.work.flops / rate for rate in ceilings["flops_per_s"]]
    figures["prefill_over_flops_floor"] = _median_ratio(samples[f"{prompt.name}_ms"], floors)

    for name, point in points.items():
        figures[f"{name}_ms"] = median[f"{name}_ms"]
        floors = [
            point.work.floor_s(*rates) for rates in zip(ceilings["flops_per_s"], ceilings["bytes_per_s"], strict=True)
        ]
        figures[f"{name}_over_roofline"] = _median_ratio(samples[f"{name}_ms"], floors)
    for length in sorted({*options.lengths, reuse}):
        figures[f"prefill_tokens_per_s_{length}"] = 1e3 * length / median[f"prefill_{length}_ms"]
    for at in options.contexts:
        for rows in options.rows:
            figures[f"decode_tokens_per_s_{rows}x{at}"] = 1e3 * rows / median[f"decode_{rows}x{at}_ms"]

    parts = zip(samples["reuse_load_ms"], samples[f"prefill_last_of_{reuse}_ms"], strict=True)
    reused = [sum(times) for times in parts]
    figures[f"reuse_load_ms_{reuse}"] = median["reuse_load_ms"]
    figures[f"reuse_ms_{reuse}"] = statistics.median(reused)
    figures[f"reuse_speedup_{reuse}"] = _median_ratio(samples[f"prefill_{reuse}_ms"], [time / 1e3 for time in reused])
    return figures


def _median_ratio(times_ms: Sequence[float], floors_s: Sequence[float]) -> float:
    """Median of each round's ratio, which cancels out slow times of the whole machine."""
    return statistics.median(taken / (1e3 * floor) for taken, floor in zip(times_ms, floors_s, strict=True))


def profile_of(probe: Probe, model: RandomModel, fitted: Fit, report: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The fields of `inference_service.device_profile.DeviceProfile`."""
    config, machine = model.config, report["machine"]
    threads = "" if model.device.type == "cuda" else f", threads: {machine['threads']}"
    return {
        "device": machine.get("gpu", machine["processor"]) + threads,
        "model": model.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "measured": True,
        "source": f"{report['command']} at {report['started_at']}: random weights, medians of {rounds} rounds, "
        f"largest error {fitted.worst_error_percent:.1f} %",
        "parameters": sum(weight.numel() for weight in model.model.parameters()),
        "layers": config.num_hidden_layers,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "max_model_len": config.max_position_embeddings,
        **asdict(probe.costs),
        **{name: value for name, value in asdict(fitted).items() if name != "worst_error_percent"},
    }


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the report, and a profile per shape. Raises `UsageError` for a shape that does not fit into memory."""
    device, dtype = device_of(options.device), getattr(torch, options.dtype)
    if device.type == "cpu":
        torch.set_num_threads(options.threads or usable_cores())
    report = conditions(options, device)
    profiles: dict[str, dict[str, Any]] = {}
    for shape in options.shape:
        check_room(shape, options, device, dtype)
        say(f"{shape}: making the weights")
        model = build(shape, device, dtype)
        probe = Probe(model, options)
        samples: dict[str, list[float]] = defaultdict(list)
        # The first round warms up (allocations, choice of kernels) and is not counted.
        for index in range(options.rounds + 1):
            say(f"{shape}: round {index} of {options.rounds}" if index else f"{shape}: warm-up")
            taken = probe.round()
            for name, value in taken.items():
                if index:
                    samples[name].append(value)
        figures = figures_of(probe, samples, options)
        times_ms = [statistics.median(samples[f"{point.name}_ms"]) for point in probe.points]
        fitted = fit([point.work for point in probe.points], times_ms, figures["ceiling_bytes_per_s"])
        figures["profile_worst_error_percent"] = fitted.worst_error_percent
        profiles[shape] = profile_of(probe, model, fitted, report, options.rounds)
        report["model"][shape] = {
            "name": model.name,
            "parameters": profiles[shape]["parameters"],
            "dtype": options.dtype,
            "weights": "random",
        }
        report["settings"]["ceilings"][shape] = {
            "flops_per_s": fastest(samples, "flops_per_s_"),
            "bytes_per_s": fastest(samples, "bytes_per_s_"),
            "buffer_bytes": probe.ceilings.buffer_bytes,
        }
        report["figures"] |= {f"{name}_{shape}": value for name, value in figures.items()}
        if shape == options.shape[0]:
            report["figures"] |= {name: figures[name] for name in HEADLINES}
        report["samples"] |= {f"{name}_{shape}": values for name, values in samples.items()}
        del model, probe
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return report, profiles


HEADLINES = ("decode_over_bandwidth_floor", "prefill_over_flops_floor", "profile_worst_error_percent")
"""Figures of the first shape that the report also has without the shape's name."""


def fastest(samples: dict[str, list[float]], prefix: str) -> str:
    """Name of the kernel with the highest median rate: it sets the ceiling."""
    rates = {name: statistics.median(values) for name, values in samples.items() if name.startswith(prefix)}
    return max(rates, key=lambda name: rates[name]).removeprefix(prefix)


def check_room(shape: str, options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Raises `UsageError` if weights, rows and the buffers of the ceilings exceed the free memory."""
    config = Qwen2Config(**SHAPES[shape][1])
    weights = shape_bytes(shape, dtype)
    rows = max(options.rows) * longest_row(options) * costs_of(config, dtype).kv_bytes_per_token
    need, free = weights + rows + min(weights, 4 << 30), free_bytes(device)
    if need > free:
        raise UsageError(
            f"--shape: {shape} needs {need / 1e9:.1f} GB ({weights / 1e9:.1f} of them weights), but {free / 1e9:.1f} "
            f"GB are free on {device}; leave it out, or lower --rows and --contexts"
        )


def device_of(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: there is no GPU here that PyTorch can use; choose cpu")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def conditions(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The part of the report that does not depend on measurements. Its keys are those of all benchmarks."""
    machine: dict[str, Any] = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return {
        "benchmark": "engine",
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "started_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),  # noqa: UP017
        "machine": machine,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "git_commit": commit,
            "git_dirty": None if changes is None else bool(changes),
        },
        "model": {},
        "rounds": options.rounds,
        "settings": {
            "shapes": options.shape,
            "dtype": options.dtype,
            "lengths": options.lengths,
            "rows": options.rows,
            "contexts": options.contexts,
            "reuse_tokens": options.reuse_tokens,
            "chunk_tokens": options.chunk_tokens,
            "square": options.square,
            "ceilings": {},
        },
        "figures": {},
        "samples": {},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def show(report: dict[str, Any]) -> str:
    """The main figures, one line per shape."""
    figures, settings = report["figures"], report["settings"]
    longest, short = max(settings["lengths"]), min(settings["contexts"])
    few, many = min(settings["rows"]), max(settings["rows"])
    columns = {
        "GFLOP/s": ("ceiling_flops_per_s", 1e-9),
        "GB/s": ("ceiling_bytes_per_s", 1e-9),
        f"prefill {longest} tokens/s": (f"prefill_tokens_per_s_{longest}", 1.0),
        "/ floor": ("prefill_over_flops_floor", 1.0),
        f"decode {few}x{short} ms": (f"decode_{few}x{short}_ms", 1.0),
        "/ floor ": ("decode_over_bandwidth_floor", 1.0),
        f"{many}x{short} tokens/s": (f"decode_tokens_per_s_{many}x{short}", 1.0),
        f"reuse {settings['reuse_tokens']} x": (f"reuse_speedup_{settings['reuse_tokens']}", 1.0),
        "profile error %": ("profile_worst_error_percent", 1.0),
    }
    lines = [f"{'shape':14}" + "".join(f"  {title}" for title in columns)]
    for shape in settings["shapes"]:
        cells = [
            f"  {figures[f'{name}_{shape}'] * factor:{len(title)}.2f}" for title, (name, factor) in columns.items()
        ]
        lines.append(f"{shape:14}" + "".join(cells))
    return "\n".join(lines)


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises `UsageError`."""
    parser = _Parser(
        "python -m benchmarks.engine", description="Prefill and decode compared with the limits of the device."
    )
    parser.add_argument("--shape", type=_names, default=["default"], help=f"from {', '.join(SHAPES)}, as a,b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one to warm up")
    parser.add_argument("--lengths", type=_numbers, default=[128, 512, 1024, 2048], help="prompt lengths in tokens")
    parser.add_argument("--rows", type=_numbers, default=[1, 4, 8, 16, 32], help="sequences that decode together")
    parser.add_argument(
        "--contexts", type=_numbers, default=[128, 1024], help="tokens that each of these sequences holds"
    )
    parser.add_argument("--reuse-tokens", type=int, default=1024, help="length of the prompt for reuse")
    parser.add_argument("--chunk-tokens", type=int, default=32, help="tokens of one reused chunk")
    parser.add_argument(
        "--square", type=int, default=0, help="size of the ceiling's square product; 0: 2048, on a GPU 8192"
    )
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/engine.json"))
    parser.add_argument("--profile-out", type=Path, default=Path("results/benchmarks/profiles"), help="a folder")
    options = parser.parse_args(arguments)
    if unknown := [shape for shape in options.shape if shape not in SHAPES]:
        raise UsageError(f"--shape: {unknown[0]!r} is unknown; choose from {', '.join(SHAPES)}")
    if options.rounds < 1 or options.chunk_tokens < 1 or options.threads < 0 or options.square < 0:
        raise UsageError("--rounds and --chunk-tokens are at least 1, --threads and --square at least 0; change it")
    if options.reuse_tokens % options.chunk_tokens or options.reuse_tokens < options.chunk_tokens:
        raise UsageError(f"--reuse-tokens: {options.reuse_tokens} is not in full chunks of {options.chunk_tokens}")
    options.square = options.square or (8192 if options.device == "cuda" else 2048)
    for shape in options.shape:
        limit = SHAPES[shape][1]["max_position_embeddings"]
        if longest_row(options) > limit:
            raise UsageError(
                f"--lengths: {shape} holds {limit} tokens, but {longest_row(options)} are needed; lower it"
            )
    return options


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(text.split(",")))


def _numbers(text: str) -> list[int]:
    numbers = sorted({int(part) for part in text.split(",")})
    if numbers[0] < 1:
        raise argparse.ArgumentTypeError("numbers from 1 on")
    return numbers


def main() -> None:
    try:
        options = options_of(sys.argv[1:])
        report, profiles = measure(options)
    except UsageError as error:
        say(f"error: {error}")
        sys.exit(2)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    options.profile_out.mkdir(parents=True, exist_ok=True)
    for shape, profile in profiles.items():
        path = options.profile_out / f"{shape}-{options.device}-{options.dtype}.json"
        path.write_text(json.dumps(profile, indent=1, allow_nan=False) + "\n")
        say(f"written to {path}")
    say(f"written to {options.out}")
    sys.stdout.write(show(report) + "\n")


if __name__ == "__main__":
    main()

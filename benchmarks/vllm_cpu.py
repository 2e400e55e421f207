"""Our engine against vLLM on the same CPU: decode with several numbers of rows, prefill, and a mix.

    python -m benchmarks.vllm_cpu --models default,large --out results/benchmarks/vllm_cpu.json

Both have the same model, prompts, answer lengths and cores. Both compute in float32, answer greedily and reuse nothing.
vLLM runs compiled, with its defaults, in its own environment, which the first run installs (6 GB). Each round gives
each load, with new prompts, to one after the other; the order alternates from round to round. Ratios are taken round by
round. The answers of both are compared.

To keep a run short, name one model at a time: the file keeps the figures of other models.
"""

import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.baselines.vllm_process import VllmProcess
from benchmarks.command import carry_out, progress, stated
from benchmarks.report import Report, conditions_of, device_facts, model_facts, ratios, spread
from benchmarks.reuse_probe import WrongMeasurementError
from core.clock import SystemClock
from core.config import Config
from core.errors import UserError, exit_on_user_error
from core.records import Request
from inference_service.byte_tokenizer import byte_tokenizer
from inference_service.completion import Completion
from inference_service.config import EngineConfig, SamplingDefaults
from inference_service.continuous_engine import ContinuousEngine
from inference_service.default_model import default_model_path
from inference_service.model import LoadedModel
from inference_service.transformers_engine import load_checked_model

CHUNK_TOKENS = 32
MAX_LEN = 1088
ROWS = 32
LARGE = "random-qwen2-134m"
LARGE_SHAPE: dict[str, Any] = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    # Wider than the usual 0.02, with which the model would repeat its last token for ever.
    "initializer_range": 0.06,
}
"""The published shape of SmolLM2-135M, as a Qwen2."""


@dataclass(frozen=True)
class PromptBatch:
    """Requests that are submitted together."""

    name: str
    requests: int
    prompt_tokens: int
    answer_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens that the throughput counts: the prompts' if an answer is a single token, otherwise the answers'."""
        return self.requests * (self.prompt_tokens if self.answer_tokens == 1 else self.answer_tokens)


LOADS = (
    PromptBatch("decode1", 1, 16, 64),
    PromptBatch("decode8", 8, 16, 64),
    PromptBatch("decode32", 32, 16, 64),
    PromptBatch("prefill1024", 1, 1024, 1),
    PromptBatch("mix", 32, 100, 32),
)
PREFIXES = {"default": "", "large": "large_"}
"""Prefix of each model's figures and samples."""


def _names(text: object) -> object:
    return tuple(text.split(",")) if isinstance(text, str) else text


class VllmCpuConfig(Config):
    """The models, and how often they are measured."""

    out: Path = Field(default=Path("results/benchmarks/vllm_cpu.json"), description="path of the report")
    models: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        default=tuple(PREFIXES), min_length=1, description="default, large, or both"
    )
    rounds: int = Field(default=5, ge=1, description="measured rounds of all loads, after one to warm up")
    threads: int = Field(default=2, ge=1, description="CPU threads of each engine")
    least_equal: float = Field(
        default=0.9, ge=0, le=1, description="share of answers that must be equal; rounding may change a few"
    )
    seed: int = Field(default=0, ge=0, description="random seed of the prompts")


class OurEngine:
    """Our engine without a cache. Every answer has the requested length."""

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        self.model = replace(model, eos_token_ids=frozenset())
        self._engine = ContinuousEngine(self.model, config, None, CHUNK_TOKENS, SystemClock())
        self._engine.warm_up()

    def answer(self, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, list[list[int]]]:
        """Answer all prompts together, greedily, with `tokens` tokens each; return seconds and answers."""
        requests = [
            Request(
                request_id=str(index),
                session_id="benchmark",
                user_id="benchmark",
                max_new_tokens=tokens,
                created_at_ms=0.0,
                prompt_token_ids=tuple(prompt),
            )
            for index, prompt in enumerate(prompts)
        ]
        began_s = time.perf_counter()
        done = self._engine.run(requests)
        took_s = time.perf_counter() - began_s
        if not all(isinstance(one, Completion) for one in done):
            raise UserError("the engine refused or failed a request of the benchmark")
        answers = {one.request.request_id: list(one.token_ids) for one in done if isinstance(one, Completion)}
        return took_s, [answers[request.request_id] for request in requests]


def large_model_path() -> Path:
    """Return the folder of the larger model, beside that of the default model. The first call builds it."""
    path = default_model_path().with_name(LARGE)
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as made, torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tokenizer = byte_tokenizer()
            config = Qwen2Config(**LARGE_SHAPE, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
            Qwen2ForCausalLM(config).save_pretrained(Path(made) / LARGE)
            tokenizer.save_pretrained(Path(made) / LARGE)
            (Path(made) / LARGE).rename(path)
    return path


def measure(config: VllmCpuConfig, console: Console) -> Report:
    """Run everything. Raises `UserError`, and `WrongMeasurementError` if answers differ too often."""
    if unknown := sorted(set(config.models) - set(PREFIXES)):
        raise UserError(f"--models: {unknown[0]!r} is not one of {', '.join(PREFIXES)}")
    cores = sorted(os.sched_getaffinity(0))[: config.threads]
    if len(cores) < config.threads:
        raise UserError(f"--threads: there are {len(cores)} cores; ask for no more")
    torch.set_num_threads(config.threads)
    reports = [_measure_one(name, cores, config, console) for name in config.models]
    report = reports[0]
    for other in reports[1:]:
        report = _joined(report, other)
    if config.out.exists():
        before = json.loads(config.out.read_text())
        if set(before["model"]) - set(config.models):
            report = _joined(_only(Report.model_validate(before), set(before["model"]) - set(config.models)), report)
    return report


def _measure_one(name: str, cores: Sequence[int], config: VllmCpuConfig, console: Console) -> Report:
    path = default_model_path() if name == "default" else large_model_path()
    engine = EngineConfig(
        model=str(path),
        device="cpu",
        max_running=ROWS,
        max_model_len=MAX_LEN,
        sampling_defaults=SamplingDefaults.NEUTRAL,
    )
    prefix, samples, equal = PREFIXES[name], defaultdict[str, list[float]](list), list[bool]()
    generator = torch.Generator().manual_seed(config.seed)
    with VllmProcess(path, MAX_LEN, ROWS, cores) as vllm:
        facts = vllm.ready()
        ours = OurEngine(load_checked_model(engine), engine)
        with progress(console) as bar:
            task = bar.add_task(name, total=(config.rounds + 1) * len(LOADS))
            for index in range(config.rounds + 1):
                for load in LOADS:
                    size = (load.requests, load.prompt_tokens)
                    # Bytes only: the byte tokenizer of both models has no other ordinary tokens.
                    prompts = torch.randint(0, 256, size, generator=generator).tolist()
                    taken: dict[str, tuple[float, list[list[int]]]] = {}
                    for side in ("ours", "vllm") if index % 2 else ("vllm", "ours"):
                        contender = ours if side == "ours" else vllm
                        # The other's threads may still spin. An unmeasured token gives them time to stop.
                        contender.answer(prompts[:1], 1)
                        taken[side] = contender.answer(prompts, load.answer_tokens)
                    bar.advance(task)
                    if not index:
                        continue
                    equal += [one == other for one, other in zip(taken["ours"][1], taken["vllm"][1], strict=True)]
                    for side, (took_s, _) in taken.items():
                        samples[f"{prefix}{side}_{load.name}_s"].append(took_s)
    share = statistics.mean(equal)
    if share < config.least_equal:
        raise WrongMeasurementError(f"{name}: only {share:.2f} of the answers are equal")
    figures = {f"{prefix}equal_answers": share}
    for load in LOADS:
        ours_s, vllm_s = (samples[f"{prefix}{side}_{load.name}_s"] for side in ("ours", "vllm"))
        figures |= spread(f"{prefix}ours_over_vllm_{load.name}", ratios(vllm_s, ours_s))
        for side, taken_s in (("ours", ours_s), ("vllm", vllm_s)):
            figures |= spread(f"{prefix}{side}_{load.name}_tokens_per_s", [load.tokens / one for one in taken_s])
    where = conditions_of(device_facts(ours.model), {name: model_facts(ours.model)}, None)
    where["versions"] |= {"vllm-cpu": facts["vllm"], "vllm-cpu's torch": facts["torch"]}
    return Report(
        benchmark="vllm_cpu",
        **where,
        rounds=config.rounds,
        settings={
            "loads": {load.name: [load.requests, load.prompt_tokens, load.answer_tokens] for load in LOADS},
            "vllm": {"compiled": True, "prefix_caching": False, "threads": facts["threads"]},
            "ours": {"cache": False, "max_running": ROWS, "max_model_len": MAX_LEN},
            "seed": config.seed,
        },
        figures={key: round(value, 4) for key, value in figures.items()},
        samples={key: [round(value, 5) for value in values] for key, values in samples.items()},
    )


def _only(report: Report, models: set[str]) -> Report:
    """Return the part of a report about these models."""

    def kept(name: str) -> bool:
        return ("large" if name.startswith(PREFIXES["large"]) else "default") in models

    return report.model_copy(
        update={
            "model": {name: facts for name, facts in report.model.items() if name in models},
            "figures": {name: value for name, value in report.figures.items() if kept(name)},
            "samples": {name: values for name, values in report.samples.items() if kept(name)},
        }
    )


def _joined(one: Report, other: Report) -> Report:
    """Join two reports. Conditions are those of the latter, commands and times those of both."""
    return other.model_copy(
        update={
            "command": "; ".join(dict.fromkeys((*one.command.split("; "), other.command))),
            "rounds": min(one.rounds, other.rounds),
            "model": one.model | other.model,
            "figures": one.figures | other.figures,
            "samples": one.samples | other.samples,
        }
    )


def show(report: Report, console: Console) -> None:
    """Print throughputs and ratios, one line per load."""
    table = Table("load", "ours\ntokens/s", "vLLM\ntokens/s", "ours\n/ vLLM", "quartiles")
    for name in report.model:
        for load in LOADS:
            prefix = PREFIXES[name]
            ratio = f"{prefix}ours_over_vllm_{load.name}"
            table.add_row(
                f"{name} {load.name}",
                *(f"{report.figures[f'{prefix}{side}_{load.name}_tokens_per_s']:.1f}" for side in ("ours", "vllm")),
                f"{report.figures[ratio]:.2f}",
                f"{report.figures[f'{ratio}_p25']:.2f} - {report.figures[f'{ratio}_p75']:.2f}",
            )
    console.print(table)


def main() -> None:
    config = stated(VllmCpuConfig, "benchmarks.vllm_cpu", "Our engine against vLLM on the same CPU.")
    carry_out(config, measure, show)


if __name__ == "__main__":
    exit_on_user_error(main)

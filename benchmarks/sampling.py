"""What a step of sampling costs beside one soft-max over the same logits.

    python -m benchmarks.sampling

Each round times the soft-max and every case once, in turn, on the same logits of 32 rows at a vocabulary of 152k.
`step_ms_32x152k` is a step in which all rows are drawn at a temperature of 0.7. `over_softmax` is the ratio of this
time to that of one `torch.softmax` over the last axis of the same float32 logits, into memory that is there: new
memory would cost it as much again. `beyond_softmax_ms` is the difference. Both are medians over the rounds.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import Field
from rich.console import Console

from benchmarks.command import carry_out, progress, stated
from benchmarks.report import Neighbours, Report, conditions_of, ratios, spread
from core.config import Config
from core.records import Sampling
from inference_service.sampling import BatchSampler, Draw, SequenceSampler

CASES = {
    "greedy": Sampling(),
    "step": Sampling(temperature=0.7, seed=1),
    "top_k_top_p": Sampling(temperature=0.7, top_k=20, top_p=0.8, seed=1),
    "top_p": Sampling(temperature=0.7, top_p=0.9, seed=1),
    "penalty": Sampling(repetition_penalty=1.1),
}
SOFTMAX, ARGMAX = "softmax", "argmax"
PROMPT_TOKENS = 512


class SamplingBenchmarkConfig(Config):
    """The logits and how often they are sampled."""

    rows: int = Field(default=32, ge=1, description="sequences of a step")
    vocabulary: int = Field(default=152_064, ge=2, description="logits of a row")
    spread: float = Field(default=3.0, gt=0, description="standard deviation of the logits")
    rounds: int = Field(default=60, ge=4, description="times that each case is measured, in turn")
    threads: int = Field(default=2, ge=1, description="CPU threads")
    out: Path = Field(default=Path("results/benchmarks/sampling.json"), description="where the report goes")


def figures_of(samples: dict[str, list[float]]) -> dict[str, float]:
    """Milliseconds of each case, and of a step over and beyond the soft-max."""
    figures = {"step_ms_32x152k": statistics.median(samples["step_ms"])}
    for name in (SOFTMAX, ARGMAX, *CASES):
        figures |= spread(f"{name}_ms", samples[f"{name}_ms"])
    figures |= spread("over_softmax", ratios(samples["step_ms"], samples[f"{SOFTMAX}_ms"]))
    pairs = zip(samples["step_ms"], samples[f"{SOFTMAX}_ms"], strict=True)
    figures |= spread("beyond_softmax_ms", [step_ms - softmax_ms for step_ms, softmax_ms in pairs])
    return figures


def measure(config: SamplingBenchmarkConfig, console: Console) -> Report:
    torch.set_num_threads(config.threads)
    generator = torch.Generator().manual_seed(0)
    logits = config.spread * torch.randn(config.rows, config.vocabulary, generator=generator)
    probabilities = torch.empty_like(logits)
    prompt = torch.randint(0, config.vocabulary, (PROMPT_TOKENS,), generator=generator).tolist()
    sampler = BatchSampler()

    def case(sampling: Sampling) -> Callable[[int], object]:
        sequences = [SequenceSampler(sampling, prompt=prompt) for _ in range(config.rows)]

        def step(index: int) -> object:
            return sampler.sample(wanted, [Draw(one, prompt[:index]) for one in sequences])

        # A penalty changes the logits in place. Its case has its own, penalised again each round: as much work.
        wanted = logits.clone() if sampling.repetition_penalty != 1 else logits
        return step

    measured: dict[str, Callable[[int], object]] = {
        SOFTMAX: lambda index: torch.softmax(logits, -1, out=probabilities),
        ARGMAX: lambda index: logits.argmax(-1).tolist(),
        **{name: case(sampling) for name, sampling in CASES.items()},
    }
    samples: dict[str, list[float]] = defaultdict(list)
    neighbours = Neighbours()
    with progress(console) as bar:
        task = bar.add_task("rounds", total=config.rounds)
        for index in range(-2, config.rounds):
            for name, run in measured.items():
                began_s = time.perf_counter()
                run(max(0, index))
                took_ms = 1000 * (time.perf_counter() - began_s)
                if index >= 0:
                    samples[f"{name}_ms"].append(round(took_ms, 4))
            bar.update(task, completed=max(0, index + 1))
    return Report(
        benchmark="sampling",
        rounds=config.rounds,
        settings=config.model_dump(mode="json", exclude={"out"}),
        figures=figures_of(samples) | {"neighbours_busy_percent": round(neighbours.busy_percent(), 2)},
        samples=dict(samples),
        **conditions_of({"threads": config.threads, "device": "cpu"}, {"name": "none: random logits"}, None),
    )


def show(report: Report, console: Console) -> None:
    for name, value in report.figures.items():
        console.print(f"{name:28} {value:.3f}")


if __name__ == "__main__":
    carry_out(stated(SamplingBenchmarkConfig, "benchmarks.sampling", "the cost of sampling"), measure, show)

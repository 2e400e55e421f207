"""The time of a step of sampling: beside one soft-max over the same logits, and with every parameter of a request.

    python -m benchmarks.sampling

Each round times the soft-max and every case once, in turn, on the same logits of 32 rows at a vocabulary of 152k.
Before each case the logits are written anew, outside of its time, as sampling may change them. As in the engine, the
process keeps memory that is freed.

- Flat logits are normal with a standard deviation of 3. Peaked ones are the same with 40 tokens per row above them, the
  first by 16 and each next one by a quarter less, so that few tokens have nearly all the probability.
- `step_ms_32x152k` is a plain step: all rows are drawn at a temperature of 0.7. `over_softmax` is the ratio of this
  time to that of one `torch.softmax` over the last axis of the same float32 logits, into memory that is there: new
  memory would cost it as much again. `beyond_softmax_ms` is the difference.
- `all_parameters` has top_k, top_p, min_p, the three penalties, a bias of 50 tokens, min_new_tokens and stop tokens,
  and log-probabilities with 5 alternatives. `all_but_logprobs` has all but the latter, `logprobs` these alone.
- `grammar` is a plain step of answers that follow a JSON schema: the masks of all rows are computed and applied. The
  tokens of its vocabulary are made up: letters, some of them after a space or a quote.
- `..._over_plain_ms` is the difference of a case to a plain step on the same logits.

All of them are medians over the rounds.
"""

import random
import statistics
import string
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import Field
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.command import carry_out, progress, stated
from benchmarks.report import Neighbours, Report, conditions_of, ratios, spread
from core.config import Config
from core.records import JsonSchema, ResponseFormat, Sampling
from inference_service.grammar_compiler import Grammars
from inference_service.host_memory import keep_freed_memory
from inference_service.logprobs import sample_with_logprobs
from inference_service.sampling import BatchSampler
from inference_service.sequence_sampler import Draw, SequenceSampler

PLAIN = Sampling(temperature=0.7, seed=1)
EVERYTHING = Sampling(
    temperature=0.7,
    top_k=20,
    top_p=0.8,
    min_p=0.02,
    repetition_penalty=1.1,
    presence_penalty=0.5,
    frequency_penalty=0.5,
    logit_bias={37 * number: 1.0 for number in range(50)},
    min_new_tokens=1 << 20,
    seed=1,
)
CASES: dict[str, tuple[Sampling, int | None]] = {
    "greedy": (Sampling(), None),
    "step": (PLAIN, None),
    "top_k_top_p": (Sampling(temperature=0.7, top_k=20, top_p=0.8, seed=1), None),
    "top_p": (Sampling(temperature=0.7, top_p=0.9, seed=1), None),
    "penalty": (Sampling(repetition_penalty=1.1), None),
    "logprobs": (PLAIN, 5),
    "all_but_logprobs": (EVERYTHING, None),
    "all_parameters": (EVERYTHING, 5),
}
"""The sampling of each case, and alternatives of its log-probabilities."""
GRAMMAR, SOFTMAX, ARGMAX = "grammar", "softmax", "argmax"
PEAKED = ("step", "top_p", "logprobs", "all_but_logprobs", "all_parameters")
"""Cases that are measured on peaked logits as well."""
BEYOND_PLAIN = ("all_parameters", "all_but_logprobs", "logprobs", GRAMMAR)
PROMPT_TOKENS = 512
END_TOKENS = (0, 1, 2)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


class SamplingBenchmarkConfig(Config):
    """The logits and how often they are sampled."""

    rows: int = Field(default=32, ge=1, description="sequences of a step")
    vocabulary: int = Field(default=152_064, ge=2, description="logits of a row")
    spread: float = Field(default=3.0, gt=0, description="standard deviation of the logits")
    rounds: int = Field(default=60, ge=4, description="times that each case is measured, in turn")
    threads: int = Field(default=2, ge=1, description="CPU threads")
    out: Path = Field(default=Path("results/benchmarks/sampling.json"), description="where the report goes")


def figures_of(samples: dict[str, list[float]]) -> dict[str, float]:
    """Milliseconds of each case, and of a step over and beyond the soft-max, and of cases beyond a plain step."""
    figures = {"step_ms_32x152k": statistics.median(samples["step_ms"])}
    for name, times in samples.items():
        figures |= spread(name, times)
    figures |= spread("over_softmax", ratios(samples["step_ms"], samples[f"{SOFTMAX}_ms"]))
    figures |= spread("beyond_softmax_ms", _differences(samples["step_ms"], samples[f"{SOFTMAX}_ms"]))
    for logits in ("", "peaked_"):
        for name in BEYOND_PLAIN:
            if case_ms := samples.get(f"{logits}{name}_ms"):
                figures |= spread(f"{logits}{name}_over_plain_ms", _differences(case_ms, samples[f"{logits}step_ms"]))
    return figures


def _differences(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [first - second for first, second in zip(one, other, strict=True)]


def made_tokenizer(tokens: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of so many tokens: all bytes, and made-up words, some after a space or a quote."""
    vocabulary = {symbol: token for token, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    chance = random.Random(0)
    while len(vocabulary) < tokens - 1:
        word = "".join(chance.choices(string.ascii_letters, k=chance.randint(2, 9)))
        vocabulary.setdefault(chance.choice(("", "", "\u0120", '"')) + word, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")  # type: ignore[no-untyped-call]


def made_logits(config: SamplingBenchmarkConfig, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat and peaked logits, `[rows, vocabulary]` of each."""
    flat = config.spread * torch.randn(config.rows, config.vocabulary, generator=generator)
    peaked = flat.clone()
    for row in peaked:
        head = torch.randperm(config.vocabulary, generator=generator)[:40]
        row[head] += 16 - torch.arange(len(head)) / 4
    return flat, peaked


def measure(config: SamplingBenchmarkConfig, console: Console) -> Report:
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    flat, peaked = made_logits(config, generator)
    # Cases sample from these, which are written anew before each.
    logits = flat.clone()
    probabilities = torch.empty_like(logits)
    prompt = torch.randint(0, config.vocabulary, (PROMPT_TOKENS,), generator=generator).tolist()
    sampler = BatchSampler()

    def case(sampling: Sampling, alternatives: int | None) -> Callable[[int], object]:
        sequences = [SequenceSampler(sampling, prompt=prompt, end_tokens=END_TOKENS) for _ in range(config.rows)]

        def step(index: int) -> object:
            draws = [Draw(one, prompt[:index]) for one in sequences]
            return sample_with_logprobs(sampler, logits, draws, [alternatives] * config.rows)

        return step

    def grammar_case() -> Callable[[int], object]:
        tokenizer = made_tokenizer(config.vocabulary)
        end = int(tokenizer.eos_token_id)
        grammars = Grammars(tokenizer, [end])
        wanted = ResponseFormat(type="json_schema", json_schema=JsonSchema(schema=SCHEMA))
        sequences = [
            SequenceSampler(PLAIN.model_copy(update={"seed": row}), end_tokens=[end], grammar=grammars.of(wanted))
            for row in range(config.rows)
        ]
        outputs: list[list[int]] = [[] for _ in sequences]

        def step(index: int) -> object:
            draws = [Draw(one, output) for one, output in zip(sequences, outputs, strict=True)]
            for output, token in zip(outputs, sampler.sample(logits, draws), strict=True):
                assert isinstance(token, int)
                # An answer that ends begins again.
                output[:] = [] if token == end else [*output, token]
            return outputs

        return step

    measured: dict[str, tuple[torch.Tensor, Callable[[int], object]]] = {
        SOFTMAX: (flat, lambda index: torch.softmax(logits, -1, out=probabilities)),
        ARGMAX: (flat, lambda index: logits.argmax(-1).tolist()),
        **{name: (flat, case(*asked)) for name, asked in CASES.items()},
        GRAMMAR: (flat, grammar_case()),
        **{f"peaked_{name}": (peaked, case(*CASES[name])) for name in PEAKED},
    }
    samples: dict[str, list[float]] = defaultdict(list)
    neighbours = Neighbours()
    with progress(console) as bar:
        task = bar.add_task("rounds", total=config.rounds)
        for index in range(-2, config.rounds):
            for name, (given, run) in measured.items():
                logits.copy_(given)
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
        console.print(f"{name:40} {value:.3f}")


if __name__ == "__main__":
    carry_out(stated(SamplingBenchmarkConfig, "benchmarks.sampling", "the cost of sampling"), measure, show)

"""Options of the workloads."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import Field

from core.config import Config
from core.errors import UserError
from workloads.registry import WORKLOADS


class Arrivals(StrEnum):
    """How the arrivals of independent requests are spread over time."""

    POISSON = "poisson"
    """Exponential gaps, as from many independent users."""
    EVEN = "even"
    """Equal gaps."""


class LongPrompts(StrEnum):
    """What happens to a trace's request if its prompt is longer than `max_prompt_tokens`."""

    SKIP = "skip"
    """It is left out. The remaining prompts are unchanged, but there are fewer requests."""
    CUT = "cut"
    """It keeps the whole blocks that fit. All arrivals stay, but prompts that differ after the cut become equal."""


class BadRows(StrEnum):
    """What happens to a trace's row that cannot be read, or that is earlier than the row above it."""

    ERROR = "error"
    """Reading stops with an error that names the row."""
    SKIP = "skip"
    """It is left out and counted."""


class TimeUnit(StrEnum):
    """Unit of a trace's times."""

    MS = "ms"
    S = "s"


class FailedCalls(StrEnum):
    """What happens to a trace's request that got no answer."""

    SKIP = "skip"
    """It is left out and counted."""
    KEEP = "keep"
    """It is sent like the others and counted. A length of 0 becomes 1."""


class PhasesConfig(Config):
    """The phases workload. Token counts are UTF-8 bytes: one byte is one token of the default model."""

    base_interval_ms: float = Field(
        default=200.0,
        ge=0,
        le=86_400_000,
        description="phases: requests arrive every base_interval_ms / 2, in the last two phases every "
        "base_interval_ms / 3",
    )
    sessions_per_user: int = Field(
        default=2, ge=1, le=1000, description="phases: number of sessions that a user alternates between"
    )
    system_prompt_tokens: int = Field(
        default=256, ge=0, le=1 << 20, description="phases: length of the system prompt that all prompts begin with"
    )
    turn_tokens: int = Field(default=64, ge=2, le=1 << 18, description="phases: mean length of a user's message")


class TraceConfig(Config):
    """Options of all trace replays: mooncake, azure and burstgpt."""

    trace: Path | None = Field(
        default=None, description="path of the trace to replay: JSON Lines for mooncake, CSV for azure and burstgpt"
    )
    time_scale: float = Field(default=1.0, gt=0, description="divide the trace's times by this")
    prompt_scale: float = Field(
        default=0.0625, gt=0, le=1000, description="azure, burstgpt: multiply the trace's prompt lengths by this"
    )
    output_scale: float = Field(
        default=0.0625, gt=0, le=1000, description="multiply the trace's answer lengths by this"
    )
    long_prompts: LongPrompts = Field(
        default=LongPrompts.SKIP,
        description="trace prompts longer than max_prompt_tokens: skip them, or cut them (mooncake: to whole blocks)",
    )
    bad_rows: BadRows = Field(
        default=BadRows.ERROR, description="trace rows that cannot be read or are out of order: error, or skip"
    )


class MooncakeConfig(Config):
    """The replay of a Mooncake trace."""

    block_tokens: int = Field(
        default=32, ge=1, le=512, description="mooncake: number of tokens that stand for one block of the trace"
    )
    trace_block_tokens: int = Field(
        default=512,
        ge=1,
        le=1 << 20,
        description="tokens per block of a Mooncake trace (Qwen-Bailian: 16); the policy lab uses it for burstgpt "
        "and azure too",
    )
    trace_time_unit: TimeUnit = Field(
        default=TimeUnit.MS, description="mooncake: unit of the trace's timestamps, ms or s (Qwen-Bailian: s)"
    )
    shared_blocks: int = Field(
        default=1, ge=0, description="mooncake: number of first blocks that requests of different sessions may share"
    )


class BurstGPTConfig(Config):
    """The replay of a BurstGPT trace."""

    failed_calls: FailedCalls = Field(
        default=FailedCalls.SKIP, description="burstgpt: calls without an answer: skip, or keep"
    )


class IndependentConfig(Config):
    """Requests that share nothing. Each has its own session and user."""

    rate_per_s: float = Field(default=2.0, gt=0, le=1e6, description="independent: mean number of requests per second")
    arrivals: Arrivals = Field(
        default=Arrivals.POISSON, description="independent: time between arrivals: poisson (random) or even (constant)"
    )
    prompt_tokens: int = Field(default=128, ge=1, le=1 << 20, description="independent: mean length of a prompt")
    answer_tokens: int = Field(default=16, ge=1, le=1 << 20, description="independent: mean length of an answer")
    length_cv: float = Field(
        default=0.0, ge=0, le=10, description="independent: coefficient of variation of both lengths; 0: all are equal"
    )
    even_over: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="independent: number of default slots that sessions take turns in; every divisor of it is "
        "covered evenly too",
    )


class WorkloadConfig(Config):
    """The load. Equal values and seeds give the same requests in every process."""

    workload: Annotated[str, WORKLOADS] = Field(
        default="phases", description="load to generate, or format of the trace to replay"
    )
    requests: int = Field(
        default=200, ge=1, le=10_000_000, description="number of requests to send; a trace may hold fewer"
    )
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="seed of all random choices in the workload")
    max_new_tokens: int = Field(
        default=32,
        ge=1,
        le=1 << 20,
        description="answer length in tokens that phases asks for; upper limit of it in all other workloads",
    )
    max_prompt_tokens: int = Field(default=1920, ge=1, le=1 << 20, description="longest prompt to send, in tokens")
    vocab_size: int = Field(
        default=256, ge=1, le=1 << 32, description="all but phases: token ids of prompts are below this"
    )
    phases: PhasesConfig = PhasesConfig()
    replay: TraceConfig = TraceConfig()
    mooncake: MooncakeConfig = MooncakeConfig()
    burstgpt: BurstGPTConfig = BurstGPTConfig()
    independent: IndependentConfig = IndependentConfig()


def trace_file(config: WorkloadConfig) -> Path:
    """Path of the trace to replay. Raises `UserError` if none is given or the path is not a file."""
    trace = config.replay.trace
    if trace is None:
        raise UserError(f"--trace: the {config.workload} workload replays a trace; give its path")
    if not trace.is_file():
        raise UserError(f"--trace: {trace} is not a file; give the path of a trace")
    return trace

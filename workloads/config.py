"""What load to offer: every option of the workloads with its default, stated once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import Field

from core.config import Config
from core.errors import UserError
from workloads.registry import WORKLOADS


class Arrivals(StrEnum):
    """How independent requests are spread over time."""

    POISSON = "poisson"
    """With exponential gaps, as from many users who do not know of each other."""
    EVEN = "even"
    """With equal gaps."""


class LongPrompts(StrEnum):
    """What becomes of a trace's request whose prompt is above `max_prompt_tokens`."""

    SKIP = "skip"
    """It is left out: fewer requests, and every prompt that remains is as the trace has it."""
    CUT = "cut"
    """It keeps the whole blocks that fit: every arrival stays, but turns that differed after the cut become equal."""


class BadRows(StrEnum):
    """What becomes of a trace's row that is not one, or that is before the row above."""

    ERROR = "error"
    """It ends the reading, and is named."""
    SKIP = "skip"
    """It is left out and counted."""


class TimeUnit(StrEnum):
    """Unit of a trace's times."""

    MS = "ms"
    S = "s"


class FailedCalls(StrEnum):
    """What becomes of a trace's request that got no answer."""

    SKIP = "skip"
    """It is left out and counted."""
    KEEP = "keep"
    """It is a request like others, and counted; a length of 0 becomes 1."""


class PhasesConfig(Config):
    """The phases workload. Token counts are UTF-8 bytes: one byte is one token of the default model."""

    base_interval_ms: float = Field(
        default=200.0, ge=0, le=86_400_000, description="phases: arrivals are this / 2 apart, in the last two this / 3"
    )
    sessions_per_user: int = Field(default=2, ge=1, le=1000, description="phases: sessions that a user alternates in")
    system_prompt_tokens: int = Field(
        default=256, ge=0, le=1 << 20, description="phases: length of the text that all prompts begin with"
    )
    turn_tokens: int = Field(default=64, ge=2, le=1 << 18, description="phases: mean length of what a user says")


class TraceConfig(Config):
    """What the replays of traces, mooncake, azure and burstgpt, have in common."""

    trace: Path | None = Field(default=None, description="path of the trace: JSON lines for mooncake, else CSV")
    time_scale: float = Field(default=1.0, gt=0, description="the trace's time is divided by this")
    prompt_scale: float = Field(
        default=0.0625, gt=0, le=1000, description="azure, burstgpt: the trace's prompt lengths are multiplied by this"
    )
    output_scale: float = Field(
        default=0.0625, gt=0, le=1000, description="the trace's answer lengths are multiplied by this"
    )
    long_prompts: LongPrompts = Field(
        default=LongPrompts.SKIP,
        description="a trace's prompts above max_prompt_tokens: skip, or cut (mooncake: to whole blocks)",
    )
    bad_rows: BadRows = Field(
        default=BadRows.ERROR, description="a trace's rows that cannot be read or are out of order: error, or skip"
    )


class MooncakeConfig(Config):
    """The replay of a Mooncake trace."""

    block_tokens: int = Field(
        default=32, ge=1, le=512, description="mooncake: tokens that a block of the trace becomes"
    )
    trace_block_tokens: int = Field(
        default=512,
        ge=1,
        le=1 << 20,
        description="tokens per block of a Mooncake trace (Qwen-Bailian: 16); policy lab: of burstgpt and azure too",
    )
    trace_time_unit: TimeUnit = Field(
        default=TimeUnit.MS, description="mooncake: unit of the trace's timestamps, ms or s; Qwen-Bailian: s"
    )
    shared_blocks: int = Field(
        default=1, ge=0, description="mooncake: leading blocks that requests share without being one session"
    )


class BurstGPTConfig(Config):
    """The replay of a BurstGPT trace."""

    failed_calls: FailedCalls = Field(
        default=FailedCalls.SKIP, description="burstgpt: calls that got no answer: skip, or keep"
    )


class IndependentConfig(Config):
    """Requests that share nothing, each a session and a user of its own."""

    rate_per_s: float = Field(default=2.0, gt=0, le=1e6, description="independent: mean rate of arrivals")
    arrivals: Arrivals = Field(default=Arrivals.POISSON, description="independent: gaps are random (poisson) or even")
    prompt_tokens: int = Field(default=128, ge=1, le=1 << 20, description="independent: mean length of a prompt")
    answer_tokens: int = Field(default=16, ge=1, le=1 << 20, description="independent: mean length of an answer")
    length_cv: float = Field(
        default=0.0, ge=0, le=10, description="independent: deviation of both lengths over their mean; 0: all equal"
    )
    even_over: int = Field(
        default=1, ge=1, le=1024, description="independent: home slots that take turns, as do those of each divisor"
    )


class WorkloadConfig(Config):
    """One offered load: the same values and the same seed are the same requests, in every process."""

    workload: Annotated[str, WORKLOADS] = Field(
        default="phases", description="load to generate, or format of the trace to replay"
    )
    requests: int = Field(default=200, ge=1, le=10_000_000, description="requests to offer; a trace may hold fewer")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="of all that is random in the workload")
    max_new_tokens: int = Field(
        default=32,
        ge=1,
        le=1 << 20,
        description="answer length: upper limit in azure, burstgpt and independent, asked for in phases, upper limit "
        "in mooncake",
    )
    max_prompt_tokens: int = Field(default=1920, ge=1, le=1 << 20, description="longest prompt to offer")
    vocab_size: int = Field(default=256, ge=1, le=1 << 32, description="all but phases: prompt tokens are below this")
    phases: PhasesConfig = PhasesConfig()
    replay: TraceConfig = TraceConfig()
    mooncake: MooncakeConfig = MooncakeConfig()
    burstgpt: BurstGPTConfig = BurstGPTConfig()
    independent: IndependentConfig = IndependentConfig()


def trace_file(config: WorkloadConfig) -> Path:
    """The trace to replay. Raises `UserError` where none is given or the path is no file."""
    trace = config.replay.trace
    if trace is None:
        raise UserError(f"--trace: the {config.workload} workload replays a trace; give its path")
    if not trace.is_file():
        raise UserError(f"--trace: {trace} is not a file; give the path of a trace")
    return trace

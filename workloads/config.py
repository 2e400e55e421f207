"""What load to offer: every option of the workloads with its default, stated once."""

from enum import StrEnum
from pathlib import Path

from pydantic import Field

from core.config import Config


class WorkloadKind(StrEnum):
    PHASES = "phases"
    """Made conversations of a user population that grows, peaks and falls."""
    MOONCAKE = "mooncake"
    """Replay of a trace in the format of Mooncake's FAST'25 release."""


class LongPrompts(StrEnum):
    """What becomes of a trace's request whose prompt is above `max_prompt_tokens`."""

    SKIP = "skip"
    """It is left out: fewer requests, and every prompt that remains is as the trace has it."""
    CUT = "cut"
    """It keeps the whole blocks that fit: every arrival stays, but turns that differed after the cut become equal."""


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


class MooncakeConfig(Config):
    """The replay of a Mooncake trace."""

    trace: Path | None = Field(default=None, description="mooncake: path of the trace, JSON lines")
    time_scale: float = Field(default=1.0, gt=0, description="mooncake: the trace's time is divided by this")
    block_tokens: int = Field(
        default=32, ge=1, le=512, description="mooncake: tokens that a 512-token block of the trace becomes"
    )
    output_scale: float = Field(
        default=0.0625, gt=0, le=1000, description="mooncake: the trace's answer lengths are multiplied by this"
    )
    vocab_size: int = Field(default=256, ge=1, le=1 << 32, description="mooncake: prompt tokens are below this")
    long_prompts: LongPrompts = Field(
        default=LongPrompts.SKIP, description="mooncake: prompts above max_prompt_tokens: skip, or cut to whole blocks"
    )
    shared_blocks: int = Field(
        default=1, ge=0, description="mooncake: leading blocks that requests share without being one session"
    )


class WorkloadConfig(Config):
    """One offered load: the same values and the same seed are the same requests, in every process."""

    workload: WorkloadKind = Field(default=WorkloadKind.PHASES, description="phases, or mooncake: replay of a trace")
    requests: int = Field(default=200, ge=1, le=10_000_000, description="requests to offer; a trace may hold fewer")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="of all that is random in the workload")
    max_new_tokens: int = Field(
        default=32, ge=1, le=1 << 20, description="answer length: asked for in phases, upper limit in mooncake"
    )
    max_prompt_tokens: int = Field(default=1920, ge=1, le=1 << 20, description="longest prompt to offer")
    phases: PhasesConfig = PhasesConfig()
    mooncake: MooncakeConfig = MooncakeConfig()

"""Options of the policy lab."""

from enum import StrEnum
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from cache.config import CacheConfig, SizingConfig
from cache.registry import EVICTION, SIZING
from core.config import Config
from experiments.config import ROOT, distinct_names, distinct_numbers
from workloads.block_trace import TraceFormat
from workloads.config import WorkloadConfig

MOST_CHUNKS = 1 << 30


class LoadFormat(StrEnum):
    """Origin of the prompts: a trace in one of the formats of `TraceFormat`, or a generated load."""

    MOONCAKE = TraceFormat.MOONCAKE
    BURSTGPT = TraceFormat.BURSTGPT
    AZURE = TraceFormat.AZURE
    PHASES = "phases"
    """The load of the cache experiments."""
    BURSTS = "bursts"


class Drive(StrEnum):
    """How the load accesses the cache."""

    REQUEST = "request"
    """As the engine does: the cache manager looks up a whole prompt, then stores it."""
    ACCESS = "access"
    """As in the literature: one block after the other. A miss is stored before the next block."""


class LabConfig(Config):
    """Runs eviction and sizing policies over a load in virtual time."""

    format: LoadFormat = Field(
        default=LoadFormat.PHASES,
        description="mooncake, burstgpt, azure; or generated, without a trace: phases, bursts",
    )
    capacity: str = Field(default="64,128,256", description="capacities in chunks, separated by commas")
    eviction: str = Field(default=",".join(EVICTION).lower(), description="eviction policies, separated by commas")
    sizing: str = Field(default="static", description=f"sizing policies, of {', '.join(SIZING).lower()}")
    least_capacity: float = Field(
        default=0.25, ge=0, le=1, description="smallest capacity a sizing policy may set, over the given capacity"
    )
    greatest_capacity: float = Field(
        default=4.0, ge=1, le=1000, description="greatest capacity a sizing policy may set, over the given capacity"
    )
    drive: Drive = Field(
        default=Drive.REQUEST, description="request: whole prompts, as the engine; access: block by block"
    )
    bounds: bool = Field(default=True, description="add the bounds: infinite, belady, belady-bypass")
    target_prefix_hit_ratio: float | None = Field(
        default=None, gt=0, lt=1, description="add each eviction policy's smallest static capacity that reaches this"
    )
    chunk_tokens: int = Field(
        default=CacheConfig.model_fields["chunk_tokens"].default, ge=1, le=4096, description="phases: tokens of a chunk"
    )
    out: Path = Field(
        default=ROOT / "results" / "policy_lab" / "policy_lab.csv", description="CSV; figures are put beside it"
    )
    figures: bool = Field(default=True, description="draw the figures")
    policy: SizingConfig = SizingConfig()
    workload: WorkloadConfig = WorkloadConfig()

    @field_validator("capacity")
    @classmethod
    def _capacities(cls, value: str) -> str:
        distinct_numbers(value, MOST_CHUNKS)
        return value

    @field_validator("eviction")
    @classmethod
    def _evictions(cls, value: str) -> str:
        distinct_names(value, EVICTION, "policy", str.lower)
        return value

    @field_validator("sizing")
    @classmethod
    def _sizings(cls, value: str) -> str:
        distinct_names(value, SIZING, "policy", str.lower)
        return value

    @model_validator(mode="after")
    def _trace_where_needed(self) -> "LabConfig":
        if not self.is_made and self.workload.replay.trace is None:
            raise ValueError(f"trace is missing; give its path, because format is {self.format}")
        if self.is_made and self.workload.replay.trace is not None:
            raise ValueError(f"trace is not read with format {self.format}; name its kind with format")
        return self

    @property
    def is_made(self) -> bool:
        """True if the load is generated and no trace is read."""
        return self.format in (LoadFormat.PHASES, LoadFormat.BURSTS)

    @property
    def capacities(self) -> tuple[int, ...]:
        return distinct_numbers(self.capacity, MOST_CHUNKS)

    @property
    def evictions(self) -> tuple[str, ...]:
        return distinct_names(self.eviction, EVICTION, "policy", str.lower)

    @property
    def sizings(self) -> tuple[str, ...]:
        return distinct_names(self.sizing, SIZING, "policy", str.lower)

    def sizing_config(self, strategy: str, capacity_chunks: int) -> SizingConfig:
        """Sizing of one run: the policy starts at `capacity_chunks` and stays within the configured shares of it."""
        update = {
            "strategy": strategy,
            "capacity_chunks": capacity_chunks,
            "min_capacity_chunks": int(self.least_capacity * capacity_chunks),
            "max_capacity_chunks": int(self.greatest_capacity * capacity_chunks),
        }
        return SizingConfig.model_validate(self.policy.model_dump() | update)

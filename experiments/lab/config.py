"""What the policy laboratory can be told."""

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
    """Where the prompts come from: a trace in one of `TraceFormat`, or a made load."""

    MOONCAKE = TraceFormat.MOONCAKE
    BURSTGPT = TraceFormat.BURSTGPT
    AZURE = TraceFormat.AZURE
    PHASES = "phases"
    """The load of the cache experiments."""
    BURSTS = "bursts"


class Drive(StrEnum):
    """How the cache is asked."""

    REQUEST = "request"
    """As the engine does: a whole prompt is looked up by the cache manager, then stored."""
    ACCESS = "access"
    """As the literature does: one block after the other; a hit is used, a miss comes in at once."""


class LabConfig(Config):
    """Runs eviction and sizing policies over a load in virtual time."""

    format: LoadFormat = Field(
        default=LoadFormat.PHASES, description="mooncake, burstgpt, azure; or made, without a trace: phases, bursts"
    )
    capacity: str = Field(default="64,128,256", description="capacities in chunks, separated by commas")
    eviction: str = Field(default=",".join(EVICTION).lower(), description="eviction policies, separated by commas")
    sizing: str = Field(default="static", description=f"sizing policies, of {', '.join(SIZING).lower()}")
    least_capacity: float = Field(
        default=0.25, ge=0, le=1, description="least capacity that a sizing policy may set, in parts of the capacity"
    )
    greatest_capacity: float = Field(
        default=4.0, ge=1, le=1000, description="greatest capacity that a sizing policy may set, likewise"
    )
    drive: Drive = Field(default=Drive.REQUEST, description="request: as the engine; access: block by block")
    bounds: bool = Field(default=True, description="add the bounds: infinite, belady, belady-bypass")
    target_prefix_hit_ratio: float | None = Field(
        default=None, gt=0, lt=1, description="add the smallest static capacity of each eviction policy that reaches it"
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
            raise ValueError(f"trace is missing; give the path of a trace, as format is {self.format}")
        if self.is_made and self.workload.replay.trace is not None:
            raise ValueError(f"trace is not read where format is {self.format}; say with format what it is")
        return self

    @property
    def is_made(self) -> bool:
        """Whether the load is made, and no trace read."""
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

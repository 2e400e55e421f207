"""Options of an inference job: its own, and those of the engine, the cache and Kafka."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from cache.config import CacheConfig
from core.config import Config
from core.kafka_config import KafkaConfig
from core.machine import usable_cores
from inference_service.config import EngineConfig

LEAST_RECOVERY_MS = 60_000
"""What a transaction must last beside the time between two checkpoints: a failure, a restart and the next commit."""


class Batching(StrEnum):
    """How requests come together in a slot's engine."""

    CONTINUOUS = "continuous"
    """They enter and leave the running batch between two steps."""
    MICRO = "micro"
    """They enter as a closed group, at a count or a deadline, and leave together."""


class Placement(StrEnum):
    """Which slot a session's requests go to."""

    SESSION = "session"
    """The one that a hash of the session names."""
    BALANCED = "balanced"
    """That one, unless it is overloaded when the session begins: then the least loaded."""


class Delivery(StrEnum):
    """How often a record can be in an output topic."""

    AT_LEAST_ONCE = "at-least-once"
    """It is there as soon as it is written. Were a worker to be cut off and to go on writing, some would be twice."""
    EXACTLY_ONCE = "exactly-once"
    """It is written in a transaction, which ends with the next checkpoint: readers of committed records see it then."""


class IsolationLevel(StrEnum):
    """Which records a reader of a topic sees, in Kafka's own words."""

    READ_COMMITTED = "read_committed"
    """Those of committed transactions, and those outside of transactions. An open transaction holds what follows it."""
    READ_UNCOMMITTED = "read_uncommitted"
    """All at once, those of open and aborted transactions included."""


class SupervisionConfig(Config):
    """What is done about the process of a slot that dies or hangs, and about requests that it dies of."""

    slot_restarts: int = Field(
        default=5,
        ge=0,
        description="restarts of a slot's process in a row, without an answer between them, before the job fails",
    )
    job_restarts: int = Field(
        default=10,
        ge=0,
        description="restarts of the job, each within an hour of the one before, until a failure is for good; "
        "what the user has to mend is never tried again",
    )
    engine_timeout_s: float = Field(
        default=120.0, gt=0, le=1e6, description="a slot's process that says nothing for this long hangs, and is killed"
    )
    load_timeout_s: float = Field(
        default=600.0, gt=0, le=1e6, description="the same while it loads its model and warms up"
    )
    max_attempts: int = Field(
        default=2, ge=1, description="deaths of a slot's process in the midst of a request that make it a dead letter"
    )

    @model_validator(mode="after")
    def _killers_are_found_out(self) -> Self:
        # One death more, where it dies before anything has begun.
        if self.slot_restarts <= self.max_attempts:
            raise ValueError(
                "slot_restarts is not above max_attempts: a request that kills would fail the job, and be asked again "
                "after its restart, for ever; raise it"
            )
        return self


class BatchingConfig(Config):
    """How requests come together in the engine: one by one as they come, or in closed groups."""

    batching: Batching = Field(default=Batching.CONTINUOUS, description="continuous, or micro: closed groups")
    max_in_flight: int = Field(
        default=64, ge=1, le=65_536, description="continuous: requests in a slot above which Kafka waits"
    )
    batch_size: int = Field(default=4, ge=1, le=1024, description="micro: requests that close a micro-batch")
    max_wait_ms: float = Field(
        default=100.0, ge=0, le=3_600_000, description="micro: longest that a request waits for others"
    )


class PlacementConfig(Config):
    """Which slot a session goes to."""

    placement: Placement = Field(
        default=Placement.BALANCED, description="session: by its hash; balanced: new ones go around an overloaded slot"
    )
    overload_ms: float = Field(
        default=500.0, ge=0, description="balanced: a slot is overloaded whose queue is longer than this"
    )
    overload_ratio: float = Field(
        default=2.0, ge=1, description="balanced: and longer than this times the mean of the others' queues"
    )
    remembered_sessions: int = Field(
        default=100_000,
        ge=1,
        description="balanced: sessions whose slot is known; one silent for so many others begins anew",
    )


class MetricsConfig(Config):
    """Where Prometheus reads the figures of the slots."""

    metrics_port: int = Field(
        default=0, ge=0, le=65_535, description="port of slot 0's metrics, slot i has the i-th after it; 0: none"
    )
    metrics_host: str = Field(default="127.0.0.1", min_length=1, description="address that metrics are served at")


class DeliveryConfig(Config):
    """What is promised of requests and answers over failures, restarts and copies."""

    delivery: Delivery = Field(
        default=Delivery.AT_LEAST_ONCE,
        description="at-least-once: answers are there at once; exactly-once: in a transaction, seen with a checkpoint",
    )
    isolation_level: IsolationLevel = Field(
        default=IsolationLevel.READ_COMMITTED,
        description="requests to read: read_committed; read_uncommitted: those of open and aborted transactions too",
    )
    transaction_timeout_ms: int = Field(
        default=900_000,
        ge=1_000,
        description="exactly-once: an outage that is longer than this less checkpoint_interval_ms loses answers",
    )
    dedup_records: int = Field(
        default=10_000,
        ge=0,
        le=10_000_000,
        description="a request is dropped whose id is among so many records before it in its partition; 0: none is",
    )
    resume_records: int = Field(
        default=10_000,
        ge=0,
        description="a job that starts without state looks for requests that have no answer among so many records of "
        "each partition before where its group stands",
    )
    clock_margin_ms: int = Field(
        default=60_000,
        ge=0,
        description="most that clocks differ: of brokers, or of clients and TaskManagers where topics keep CreateTime",
    )


class JobConfig(Config):
    """One inference job."""

    job_name: str = Field(default="infertuner", min_length=1, max_length=200, description="name in Flink's UI")
    parallelism: Annotated[int, Field(ge=1, le=128)] = Field(default=2, description="slots: one engine and cache each")
    checkpoint_interval_ms: int = Field(default=10_000, ge=100, description="time between two checkpoints")
    bounded: bool = Field(default=False, description="stop at the end of what the requests topic holds at the start")
    ship_connector: bool = Field(
        default=False, description="send the Kafka connector along, for a cluster that lacks it"
    )
    slot_logging: Path | None = Field(
        default=None, description="JSON file for logging.config of each slot's process, to log more, or elsewhere"
    )
    engine: EngineConfig = EngineConfig()
    cache: CacheConfig = CacheConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    batching: BatchingConfig = BatchingConfig()
    placing: PlacementConfig = PlacementConfig()
    metrics: MetricsConfig = MetricsConfig()
    kafka: KafkaConfig = KafkaConfig()
    delivery: DeliveryConfig = DeliveryConfig()

    @property
    def threads_per_slot(self) -> int:
        """CPU threads of one slot: as set, or the cores that this process may use, shared out evenly."""
        return self.engine.threads or max(1, usable_cores() // self.parallelism)

    @model_validator(mode="after")
    def _budget_holds_the_least(self) -> Self:
        sizing = self.cache.sizing
        if sizing.budget_chunks is not None and sizing.budget_chunks < self.parallelism * sizing.min_capacity_chunks:
            raise ValueError(
                "budget_chunks is below min_capacity_chunks of all slots; raise it, or lower that or parallelism"
            )
        return self

    @model_validator(mode="after")
    def _transactions_outlast_checkpoints(self) -> Self:
        if (
            self.delivery.delivery is Delivery.EXACTLY_ONCE
            and self.delivery.transaction_timeout_ms < self.checkpoint_interval_ms + LEAST_RECOVERY_MS
        ):
            raise ValueError(
                f"transaction_timeout_ms is below checkpoint_interval_ms + {LEAST_RECOVERY_MS}, time for a restart; "
                "raise it, or lower that"
            )
        return self

    @model_validator(mode="after")
    def _ports_exist(self) -> Self:
        if self.metrics.metrics_port and self.metrics.metrics_port + self.parallelism - 1 > 65_535:
            raise ValueError("metrics_port leaves no port for the last slot; lower it")
        return self

    @model_validator(mode="after")
    def _batch_fits(self) -> Self:
        if self.batching.batching is Batching.MICRO and self.batching.batch_size > self.engine.max_running:
            raise ValueError("batch_size is above max_running; raise --max-running or lower --batch-size")
        return self

    @model_validator(mode="after")
    def _nothing_to_reuse_where_simulated(self) -> Self:
        if self.engine.is_simulated and self.cache.cache:
            raise ValueError("cache has nothing to reuse where engine is simulated; add --no-cache")
        return self

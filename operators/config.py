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
"""How much longer than a checkpoint interval a transaction must last: for a failure, a restart and the next commit."""


class Batching(StrEnum):
    """How requests are batched in a slot's engine."""

    CONTINUOUS = "continuous"
    """Requests enter and leave the running batch between two steps."""
    MICRO = "micro"
    """Requests run as closed groups. A group closes at a size or a deadline."""


class Placement(StrEnum):
    """How the slot of a session is chosen."""

    SESSION = "session"
    """By a hash of the session."""
    BALANCED = "balanced"
    """By the same hash. If that slot is overloaded when the session begins, the least loaded slot is used."""


class Delivery(StrEnum):
    """How often an answer may appear in an output topic."""

    AT_LEAST_ONCE = "at-least-once"
    """An answer is visible as soon as it is written. A worker that is cut off but keeps writing may duplicate it."""
    EXACTLY_ONCE = "exactly-once"
    """Answers are written in a transaction. Readers of committed records see them after the next checkpoint."""


class IsolationLevel(StrEnum):
    """Which records a consumer reads, by Kafka's names."""

    READ_COMMITTED = "read_committed"
    """Records of committed transactions, and records outside of transactions, up to the first open transaction."""
    READ_UNCOMMITTED = "read_uncommitted"
    """All records, including those of open and aborted transactions."""


class SupervisionConfig(Config):
    """What happens if a slot's process dies or hangs."""

    slot_restarts: int = Field(
        default=5,
        ge=0,
        description="maximum restarts of a slot's process in a row, without an answer in between; after that the "
        "job fails",
    )
    job_restarts: int = Field(
        default=10,
        ge=0,
        description="maximum restarts of the job, each within an hour of the previous one; after that it fails for "
        "good. An error that the user must fix is never retried",
    )
    engine_timeout_s: float = Field(
        default=120.0, gt=0, le=1e6, description="kill the slot process after this long without a heartbeat"
    )
    load_timeout_s: float = Field(
        default=600.0,
        gt=0,
        le=1e6,
        description="kill the slot process after this long without a heartbeat while it loads its model and warms up",
    )
    max_attempts: int = Field(
        default=2,
        ge=1,
        description="a request becomes a dead letter when the slot's process has died this often while running it",
    )

    @model_validator(mode="after")
    def _killers_are_found_out(self) -> Self:
        # The process may die once more before any request has begun.
        if self.slot_restarts <= self.max_attempts:
            raise ValueError(
                "slot_restarts is not above max_attempts: a request that kills would fail the job, and be asked again "
                "after its restart, for ever; raise it"
            )
        return self


class BatchingConfig(Config):
    """How requests are batched: continuously, or in closed groups."""

    batching: Batching = Field(
        default=Batching.CONTINUOUS,
        description="continuous: requests enter and leave between steps; micro: closed groups",
    )
    max_in_flight: int = Field(
        default=64,
        ge=1,
        le=65_536,
        description="continuous: maximum requests in a slot; a full slot stops reading from Kafka",
    )
    batch_size: int = Field(default=4, ge=1, le=1024, description="micro: number of requests that closes a micro-batch")
    max_wait_ms: float = Field(
        default=100.0,
        ge=0,
        le=3_600_000,
        description="micro: longest time that a request waits for its micro-batch to close",
    )


class PlacementConfig(Config):
    """How the slot of a session is chosen."""

    placement: Placement = Field(
        default=Placement.BALANCED,
        description="session: by a hash of the session; balanced: new sessions avoid overloaded slots",
    )
    overload_ms: float = Field(
        default=500.0, ge=0, description="balanced: the queue of an overloaded slot takes longer than this"
    )
    overload_ratio: float = Field(
        default=2.0,
        ge=1,
        description="balanced: the queue of an overloaded slot also takes longer than this multiple of the others' "
        "mean",
    )
    remembered_sessions: int = Field(
        default=100_000,
        ge=1,
        description="balanced: number of sessions whose slot is remembered; the longest inactive session is "
        "forgotten first",
    )


class MetricsConfig(Config):
    """Where Prometheus reads the metrics of the slots."""

    metrics_port: int = Field(
        default=0,
        ge=0,
        le=65_535,
        description="port of slot 0's Prometheus metrics; slot i uses the i-th port after it; 0: no metrics",
    )
    metrics_host: str = Field(default="127.0.0.1", min_length=1, description="address to serve the metrics on")


class DeliveryConfig(Config):
    """Guarantees for requests and answers over failures, restarts and duplicates."""

    delivery: Delivery = Field(
        default=Delivery.AT_LEAST_ONCE,
        description="at-least-once: answers are visible at once; exactly-once: after the next checkpoint",
    )
    isolation_level: IsolationLevel = Field(
        default=IsolationLevel.READ_COMMITTED,
        description="requests to read: read_committed, or read_uncommitted (also those of open and aborted "
        "transactions)",
    )
    transaction_timeout_ms: int = Field(
        default=900_000,
        ge=1_000,
        description="exactly-once: timeout of Kafka transactions; an outage longer than this minus "
        "checkpoint_interval_ms loses answers",
    )
    dedup_records: int = Field(
        default=10_000,
        ge=0,
        le=10_000_000,
        description="drop a request if its id occurred among this many previous requests of its partition; 0: drop "
        "none",
    )
    resume_records: int = Field(
        default=10_000,
        ge=0,
        description="a job that starts without state searches this many records per partition before its group's "
        "offset for requests without an answer",
    )
    clock_margin_ms: int = Field(
        default=60_000,
        ge=0,
        description="maximum clock skew between brokers, or between clients and TaskManagers if the topics use "
        "CreateTime",
    )


class JobConfig(Config):
    """One inference job."""

    job_name: str = Field(
        default="infertuner", min_length=1, max_length=200, description="name of the job in Flink's UI"
    )
    parallelism: Annotated[int, Field(ge=1, le=128)] = Field(
        default=2, description="number of slots; each has its own engine and cache"
    )
    checkpoint_interval_ms: int = Field(default=10_000, ge=100, description="time between two checkpoints")
    bounded: bool = Field(default=False, description="stop after the requests that the topic holds at the start")
    ship_connector: bool = Field(
        default=False, description="send the Kafka connector with the job, for a cluster without it"
    )
    slot_logging: Path | None = Field(
        default=None, description="path of a JSON file with the logging.config of each slot's process"
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
        """CPU threads of one slot: as configured, or an equal share of the cores that this process may use."""
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

"""Configuration: frozen, validated once, every default written once, here.

Each class is one concern; a job's configuration is made of them. `core.options` turns the fields into command-line
options of the same names (`max_wait_ms` is `--max-wait-ms`), so that a name never has two spellings.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from core.machine import usable_cores
from core.records import MAX_RESULT_BYTES

MIB = 1 << 20
LEAST_RECOVERY_MS = 60_000
"""What a transaction must last beside the time between two checkpoints: a failure, a restart and the next commit."""


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Strategy(StrEnum):
    """How the local tier's capacity is set."""

    STATIC = "STATIC"
    FLUID = "FLUID"
    FREQUENCY = "FREQUENCY"
    MRC = "MRC"


class MrcGoal(StrEnum):
    """What the strategy MRC reads off its curve."""

    HIT_RATE = "hit_rate"
    """The smallest capacity that reaches a hit rate."""
    PRICE = "price"
    """The greatest capacity at which every chunk still gains its price."""


class Batching(StrEnum):
    """How requests come together in a slot's engine."""

    CONTINUOUS = "continuous"
    """They enter and leave the running batch between two steps."""
    MICRO = "micro"
    """They enter as a closed group, at a count or a deadline, and leave together."""


class EngineKind(StrEnum):
    """What computes."""

    TRANSFORMERS = "transformers"
    SIMULATED = "simulated"
    """A model of a device's times, and nothing else: it waits instead of computing."""


class SamplingDefaults(StrEnum):
    """How tokens are chosen where a request does not say."""

    MODEL = "model"
    """As the model's `generation_config.json` says."""
    NEUTRAL = "neutral"
    """The most likely token, without penalties, filters or rules."""


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


class RemoteCodec(StrEnum):
    """What a chunk is in Redis."""

    RAW = "raw"
    """Its tensor, bit by bit."""
    INT8 = "int8"
    """Eight bits a number, with scales: close to the tensor, not equal to it."""


class KafkaSecurity(StrEnum):
    """How clients speak to Kafka, in its own words."""

    PLAINTEXT = "PLAINTEXT"
    SSL = "SSL"
    SASL_PLAINTEXT = "SASL_PLAINTEXT"
    SASL_SSL = "SASL_SSL"

    @property
    def has_tls(self) -> bool:
        return self in (KafkaSecurity.SSL, KafkaSecurity.SASL_SSL)

    @property
    def has_user(self) -> bool:
        return self in (KafkaSecurity.SASL_PLAINTEXT, KafkaSecurity.SASL_SSL)


class SaslMechanism(StrEnum):
    """How a client proves to Kafka who it is."""

    PLAIN = "PLAIN"
    SCRAM_SHA_256 = "SCRAM-SHA-256"
    SCRAM_SHA_512 = "SCRAM-SHA-512"


class Eviction(StrEnum):
    """Which chunk leaves a full local tier."""

    LRU = "LRU"
    """The least recently used."""
    FIFO = "FIFO"
    """The one that came in first."""
    LFU = "LFU"
    """The least frequently used."""
    ARC = "ARC"
    """LRU over those used once and those used again, the share of each learned."""
    MQ = "MQ"
    """LRU by classes of frequency, that fall with time; frequencies outlive the chunks."""
    DENSITY = "DENSITY"
    """The one that promises the fewest uses for its room, as learned from ages at reuse; it may be a newcomer."""
    LEADER = "LEADER"
    """LRU or DENSITY: the one that would have hit more so far."""


class SizingConfig(Config):
    """The local tier's capacity in chunks, and the parameters of the policies that change it."""

    strategy: Strategy = Field(default=Strategy.STATIC, description="sizing policy of the local tier")
    capacity_chunks: int = Field(default=64, ge=0, description="local capacity of a slot: fixed, or to begin with")
    min_capacity_chunks: int = Field(default=32, ge=0, description="least local capacity a policy may set")
    max_capacity_chunks: int = Field(default=384, ge=0, description="greatest local capacity a policy may set")
    adjust_every_requests: int = Field(default=15, ge=1, description="requests between two decisions of a policy")
    fluid_window_ms: float = Field(default=3000.0, gt=0, description="FLUID: span over which the rate is taken")
    fluid_history_weight: float = Field(default=0.7, ge=0, lt=1, description="FLUID: weight of the past average")
    fluid_grow_above: float = Field(default=1.35, gt=1, description="FLUID: grow above this share of the average")
    fluid_shrink_below: float = Field(default=0.65, gt=0, lt=1, description="FLUID: shrink below this share")
    fluid_grow_factor: float = Field(default=1.25, gt=1, description="FLUID: growth of one step")
    fluid_shrink_factor: float = Field(default=1.15, gt=1, description="FLUID: a step down divides by this")
    frequency_buckets: int = Field(default=500, ge=1, description="FREQUENCY: buckets that keys are counted in")
    frequency_coverage: float = Field(default=0.9, gt=0, le=1, description="FREQUENCY: share of accesses to cover")
    frequency_window_accesses: int = Field(
        default=65_536, ge=1, description="FREQUENCY: most recent accesses that are remembered; bounds its memory"
    )
    mrc_goal: MrcGoal = Field(
        default=MrcGoal.HIT_RATE, description="MRC: hit_rate, to reach the target; price, chunks that are worth it"
    )
    mrc_target_hit_rate: float = Field(
        default=0.75,
        gt=0,
        lt=1,
        description="MRC, hit_rate: share of all chunks looked up that the local tier is to have, first uses included; "
        "no cache has those, so that a target above what is ever used again is out of reach",
    )
    mrc_price: float = Field(
        default=0.002,
        gt=0,
        description="MRC, price, or a target out of reach: hits a second that another chunk has to gain; "
        "0.002 is one in 500 s",
    )
    mrc_half_life_requests: float = Field(
        default=100.0, gt=0, description="MRC: requests after which an access counts for half of one on the curve"
    )
    mrc_horizon_requests: float = Field(
        default=2000.0, gt=0, description="MRC, hit_rate: requests after which a hit too few counts for half of one"
    )
    mrc_catch_up: float = Field(
        default=2.0, ge=0, description="MRC, hit_rate: hits too few are made up for in the curve's span over this"
    )
    mrc_warmup_requests: int = Field(
        default=30, ge=0, description="MRC: first requests, in which the tier grows with what is looked up"
    )
    mrc_grow_factor: float = Field(default=2.0, gt=1, description="MRC: the most that one decision multiplies by")
    mrc_shrink_factor: float = Field(default=2.0, gt=1, description="MRC: the most that one decision divides by")
    mrc_hysteresis: float = Field(
        default=0.05, ge=0, lt=1, description="MRC: a change by no more than this share is not made"
    )
    mrc_dwell_ms: float = Field(
        default=2000.0, ge=0, description="MRC: least time from a change to a shrink; growing never waits"
    )
    mrc_tracked_chunks: int = Field(
        default=16_384,
        ge=64,
        description="MRC: keys that are remembered; bounds its memory. With a greatest capacity above this, a sample "
        "of all keys",
    )
    budget_chunks: int | None = Field(
        default=None,
        ge=0,
        description="MRC: chunks of all slots together, shared by what they gain, in place of goal and "
        "capacity_chunks; none: each slot sizes itself",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_capacity_chunks > self.max_capacity_chunks:
            raise ValueError("min_capacity_chunks is above max_capacity_chunks; swap them")
        return self


def _redis_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        named = {"username", "password"} & parse_qs(parts.query).keys()
    except ValueError:
        raise ValueError("is no URL; write redis://host:port/db") from None
    if "@" in url or named:
        raise ValueError(
            "names a user or a password, which others may see there; set INFERTUNER_REDIS_USERNAME and "
            "INFERTUNER_REDIS_PASSWORD instead, or give --redis-credentials-file"
        )
    database = parts.path.strip("/")
    # The client would take database 0 for any other word.
    if parts.scheme in ("redis", "rediss") and database and not (database.isascii() and database.isdigit()):
        raise ValueError(f"names the database {database!r}, which is no number; write redis://host:port/0")
    return url


RedisUrl = Annotated[str, AfterValidator(_redis_url)]
"""Where a Redis is, and nothing of who asks."""


def _on_every_host(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError("is read on every host of the job; give the whole path, from / on")
    if not set(str(path)).isdisjoint(':{},"\\'):
        raise ValueError('has one of : { } , " \\ in its path, which Kafka would misread; choose another')
    return path


HostFile = Annotated[Path, AfterValidator(_on_every_host)]
"""A file that is under the same path, not necessarily of the same content, on each host of a job."""


class RedisAccessConfig(Config):
    """Who asks Redis. Over TLS the URL is `rediss://host:port/db?ssl_ca_certs=FILE`."""

    redis_credentials_file: HostFile | None = Field(
        default=None,
        description="file, on each host, with password=... and maybe username=..., readable by its owner alone; none: "
        "INFERTUNER_REDIS_USERNAME and INFERTUNER_REDIS_PASSWORD of its environment, if set",
    )


class RemoteConfig(Config):
    """The Redis tier. Without `redis_url` there is none."""

    redis_url: RedisUrl | None = Field(
        default=None, description="redis://host:port/db of the remote tier, rediss:// over TLS; none: no Redis"
    )
    access: RedisAccessConfig = RedisAccessConfig()
    redis_namespace: str = Field(
        default="infertuner", min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:-]+$", description="prefix of keys"
    )
    remote_codec: RemoteCodec = Field(
        default=RemoteCodec.RAW, description="chunks in Redis: raw, bit-exact; int8, smaller and approximate"
    )
    chunk_key_file: HostFile | None = Field(
        default=None,
        description="file, on each host, with the key that authenticates chunks in Redis, readable by its owner alone; "
        "none: INFERTUNER_CHUNK_KEY of its environment, if set",
    )
    remote_deadline_ms: float = Field(default=100.0, gt=0, description="longest that a request may wait for Redis")
    remote_ttl_s: int = Field(default=3600, ge=1, description="lifetime of a chunk in Redis")
    remote_read_bytes: int = Field(default=4 * MIB, ge=1, description="bytes asked of Redis in one round trip")
    prefetch_bytes: int = Field(
        default=64 * MIB, ge=0, description="chunks fetched from Redis for requests that wait in the queue"
    )
    remote_known_chunks: int = Field(
        default=65_536, ge=1, description="chunks that are known to be in Redis and not written again"
    )
    write_queue_bytes: int = Field(default=64 * MIB, ge=0, description="write-behind queue; full, it drops the newest")
    write_flush_ms: float = Field(default=20.0, ge=0, description="longest a chunk waits for others to be written with")
    breaker_failures: int = Field(default=3, ge=1, description="failures in a row after which Redis is left alone")
    breaker_open_ms: float = Field(default=2000.0, gt=0, description="time until one probe may try Redis again")


class CacheConfig(Config):
    """The two-level cache of one slot."""

    cache: bool = Field(default=True, description="reuse key/value chunks at all")
    chunk_tokens: int = Field(default=32, ge=1, le=4096, description="tokens of one chunk, the cache's entry")
    eviction: Eviction = Field(default=Eviction.LRU, description="eviction policy of the local tier")
    sizing: SizingConfig = SizingConfig()
    remote: RemoteConfig = RemoteConfig()


DTYPES = ("float32", "bfloat16", "float16")


class EngineConfig(Config):
    """The model and the pool of slots it runs on."""

    engine: EngineKind = Field(default=EngineKind.TRANSFORMERS, description="transformers, or simulated: only its time")
    profile: Path | None = Field(default=None, description="simulated: JSON file of the device's times")
    model: str = Field(default="default", min_length=1, description="path or name of a causal LM; default: built here")
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: one GPU a slot if there are, else cpu"
    )
    dtype: str = Field(
        default="auto",
        pattern=f"^({'|'.join(('auto', *DTYPES))})$",
        description="of weights and key/value; auto: the checkpoint's on a GPU, float32 on a CPU",
    )
    sampling_defaults: SamplingDefaults = Field(
        default=SamplingDefaults.MODEL,
        description="where a request does not say: model, as its generation_config.json; neutral, the likeliest token",
    )
    max_running: int = Field(default=8, ge=1, le=1024, description="sequences that decode together")
    max_model_len: int = Field(default=2048, ge=2, description="longest sequence, prompt and answer, in tokens")
    max_running_tokens: int = Field(
        default=0, ge=0, description="prompt and answer tokens of all that runs; 0: max_running * max_model_len"
    )
    step_prefill_tokens: int = Field(
        default=256, ge=0, description="continuous: prompt tokens prefilled between two decode steps; 0: no limit"
    )
    step_prefill_ms: float = Field(
        default=50.0,
        ge=0,
        description="continuous: longest that a prompt above step_prefill_tokens holds running ones; 0: no limit",
    )
    threads: int = Field(
        default=0, ge=0, le=1024, description="CPU threads of one slot; 0: cores that it may use / parallelism"
    )
    allow_special_tokens: bool = Field(
        default=False,
        description="special tokens that the text of a request spells are those tokens; else they are text",
    )
    request_timeout_ms: float = Field(
        default=600_000.0,
        ge=0,
        description="a request that is not answered this long after it was decoded becomes a dead letter; 0: never",
    )

    @model_validator(mode="after")
    def _profile_where_simulated(self) -> Self:
        if self.engine is EngineKind.SIMULATED and self.profile is None:
            raise ValueError("profile is missing; name the file that benchmarks/engine.py wrote")
        if self.engine is not EngineKind.SIMULATED and self.profile is not None:
            raise ValueError("profile is only read where engine is simulated; leave it out, or add that")
        return self


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


class KafkaAccessConfig(Config):
    """How Kafka is spoken to, and as whom."""

    kafka_security: KafkaSecurity = Field(
        default=KafkaSecurity.PLAINTEXT,
        description="PLAINTEXT; SSL: over TLS; SASL_PLAINTEXT: as a user; SASL_SSL: as a user, over TLS",
    )
    kafka_sasl_mechanism: SaslMechanism = Field(
        default=SaslMechanism.PLAIN, description="SASL: PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512"
    )
    kafka_ca_file: HostFile | None = Field(
        default=None,
        description="SSL: PEM file, on each host, of the CA to trust; none: those that Java and Python come with",
    )
    kafka_credentials_file: HostFile | None = Field(
        default=None,
        description="SASL: file, on each host, with username=... and password=..., readable by its owner alone; none: "
        "INFERTUNER_KAFKA_USERNAME and INFERTUNER_KAFKA_PASSWORD of its environment",
    )

    @model_validator(mode="after")
    def _all_of_it_is_used(self) -> Self:
        # Whoever gives one of them must not be left without what it promises.
        if self.kafka_ca_file is not None and not self.kafka_security.has_tls:
            raise ValueError("kafka_ca_file is only read over TLS; add --kafka-security SSL or SASL_SSL")
        if self.kafka_credentials_file is not None and not self.kafka_security.has_user:
            raise ValueError("kafka_credentials_file is only read with SASL; add --kafka-security SASL_SSL")
        return self


class MetricsConfig(Config):
    """Where Prometheus reads the figures of the slots."""

    metrics_port: int = Field(
        default=0, ge=0, le=65_535, description="port of slot 0's metrics, slot i has the i-th after it; 0: none"
    )
    metrics_host: str = Field(default="127.0.0.1", min_length=1, description="address that metrics are served at")


class KafkaConfig(Config):
    """The broker and the names of the topics."""

    brokers: str = Field(default="127.0.0.1:9092", min_length=1, description="Kafka bootstrap servers, host:port,...")
    topic_prefix: str = Field(
        default="llm", pattern=r"^[A-Za-z0-9._-]{1,200}$", description="topics are PREFIX.requests, .responses, ..."
    )
    consumer_group: str = Field(default="infertuner", min_length=1, description="Kafka group id of the job")
    access: KafkaAccessConfig = KafkaAccessConfig()

    @property
    def requests_topic(self) -> str:
        return f"{self.topic_prefix}.requests"

    @property
    def responses_topic(self) -> str:
        return f"{self.topic_prefix}.responses"

    @property
    def dead_letters_topic(self) -> str:
        return f"{self.topic_prefix}.dead-letters"

    @property
    def ready_topic(self) -> str:
        """One record a slot, once its model is loaded and warm."""
        return f"{self.topic_prefix}.ready"

    def topic_settings(self, topic: str) -> dict[str, str]:
        """Settings of the broker's that `topic` is created with."""
        # Recovery looks for answers by the time of a request's record: best by one clock, the broker's.
        settings = {"message.timestamp.type": "LogAppendTime"}
        if topic in (self.responses_topic, self.dead_letters_topic):
            settings["max.message.bytes"] = str(MAX_RESULT_BYTES)
        return settings

    @property
    def topics(self) -> tuple[str, ...]:
        return (self.requests_topic, self.responses_topic, self.dead_letters_topic, self.ready_topic)


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
        if self.engine.engine is EngineKind.SIMULATED and self.cache.cache:
            raise ValueError("cache has nothing to reuse where engine is simulated; add --no-cache")
        return self

"""Options of the cache: its two tiers, and the policies of the local tier."""

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from cache.registry import EVICTION, SIZING
from core.config import Config, HostFile
from core.redis_config import RedisAccessConfig, RedisUrl

MIB = 1 << 20


class MrcGoal(StrEnum):
    """What the sizing policy MRC aims for."""

    HIT_RATE = "hit_rate"
    """The smallest capacity that reaches the target hit rate."""
    PRICE = "price"
    """The largest capacity at which every chunk still gains enough hits per second."""


class RemoteCodec(StrEnum):
    """How a chunk is encoded in Redis."""

    RAW = "raw"
    """The bytes of its tensor, bit-exact."""
    INT8 = "int8"
    """Eight bits per number, with scales. The decoded tensor is close to the original, not equal."""


class SizingConfig(Config):
    """Capacity of the local tier in chunks, and the parameters of the sizing policies."""

    strategy: Annotated[str, SIZING] = Field(default="STATIC", description="sizing policy of the local tier")
    capacity_chunks: int = Field(
        default=64,
        ge=0,
        description="capacity of a slot's local tier in chunks; a policy that changes the capacity starts there",
    )
    min_capacity_chunks: int = Field(default=32, ge=0, description="smallest capacity that a policy may set")
    max_capacity_chunks: int = Field(default=384, ge=0, description="largest capacity that a policy may set")
    adjust_every_requests: int = Field(
        default=15, ge=1, description="number of requests between two decisions of a policy"
    )
    fluid_window_ms: float = Field(
        default=3000.0, gt=0, description="FLUID: time window over which the request rate is measured"
    )
    fluid_history_weight: float = Field(
        default=0.7, ge=0, lt=1, description="FLUID: weight of the previous average when a new rate is averaged in"
    )
    fluid_grow_above: float = Field(
        default=1.35, gt=1, description="FLUID: grow if the rate is above this multiple of its average"
    )
    fluid_shrink_below: float = Field(
        default=0.65, gt=0, lt=1, description="FLUID: shrink if the rate is below this multiple of its average"
    )
    fluid_grow_factor: float = Field(
        default=1.25, gt=1, description="FLUID: one step up multiplies the capacity by this"
    )
    fluid_shrink_factor: float = Field(
        default=1.15, gt=1, description="FLUID: one step down divides the capacity by this"
    )
    frequency_buckets: int = Field(
        default=500, ge=1, description="FREQUENCY: number of buckets that keys are counted in"
    )
    frequency_coverage: float = Field(
        default=0.9, gt=0, le=1, description="FREQUENCY: share of all accesses that the capacity must cover"
    )
    frequency_window_accesses: int = Field(
        default=65_536,
        ge=1,
        description="FREQUENCY: number of most recent accesses to count; bounds the policy's memory",
    )
    mrc_goal: MrcGoal = Field(
        default=MrcGoal.HIT_RATE,
        description="MRC: hit_rate reaches mrc_target_hit_rate; price adds chunks as long as each is worth mrc_price",
    )
    mrc_target_hit_rate: float = Field(
        default=0.75,
        gt=0,
        lt=1,
        description="MRC with hit_rate: target share of looked-up chunks that are in the local tier. First uses "
        "count as misses, so a target above the share of repeated uses cannot be reached",
    )
    mrc_price: float = Field(
        default=0.002,
        gt=0,
        description="MRC with price, or with a target that cannot be reached: hits per second that one more chunk "
        "must gain; 0.002 is one hit in 500 s",
    )
    mrc_half_life_requests: float = Field(
        default=100.0, gt=0, description="MRC: number of requests after which an access counts half on the curve"
    )
    mrc_horizon_requests: float = Field(
        default=2000.0,
        gt=0,
        description="MRC with hit_rate: number of requests after which a past shortfall of hits counts half",
    )
    mrc_catch_up: float = Field(
        default=2.0,
        ge=0,
        description="MRC with hit_rate: make up a shortfall of hits within the time span of the curve divided by "
        "this; 0: never",
    )
    mrc_warmup_requests: int = Field(
        default=30,
        ge=0,
        description="MRC: for this many first requests the capacity grows with the number of chunks looked up",
    )
    mrc_grow_factor: float = Field(
        default=2.0, gt=1, description="MRC: one decision multiplies the capacity by at most this"
    )
    mrc_shrink_factor: float = Field(
        default=2.0, gt=1, description="MRC: one decision divides the capacity by at most this"
    )
    mrc_hysteresis: float = Field(
        default=0.05, ge=0, lt=1, description="MRC: changes by at most this share of the capacity are skipped"
    )
    mrc_dwell_ms: float = Field(
        default=2000.0,
        ge=0,
        description="MRC: minimum time between a change and a later decrease; an increase never waits",
    )
    mrc_tracked_chunks: int = Field(
        default=16_384,
        ge=64,
        description="MRC: number of keys to track; bounds the policy's memory. If max_capacity_chunks is larger, a "
        "sample of all keys is tracked",
    )
    budget_chunks: int | None = Field(
        default=None,
        ge=0,
        description="MRC: capacity of all slots together, in chunks, given to the slots where it gains most. It "
        "replaces mrc_goal and capacity_chunks; none: each slot sizes itself",
    )

    @property
    def shares_budget(self) -> bool:
        """True if the capacity is a share of `budget_chunks`. Only MRC keeps the curve that sharing needs."""
        return self.budget_chunks is not None and self.strategy == "MRC"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_capacity_chunks > self.max_capacity_chunks:
            raise ValueError("min_capacity_chunks is above max_capacity_chunks; swap them")
        return self


class RemoteConfig(Config):
    """The remote tier in Redis. Without `redis_url` there is none."""

    redis_url: RedisUrl | None = Field(
        default=None, description="redis://host:port/db of the remote tier, rediss:// for TLS; none: no remote tier"
    )
    access: RedisAccessConfig = RedisAccessConfig()
    redis_namespace: str = Field(
        default="infertuner",
        min_length=1,
        max_length=128,
        pattern=r"^[A-Za-z0-9._:-]+$",
        description="prefix of all keys in Redis",
    )
    remote_codec: RemoteCodec = Field(
        default=RemoteCodec.RAW,
        description="encoding of chunks in Redis: raw is bit-exact, int8 is smaller and approximate",
    )
    chunk_key_file: HostFile | None = Field(
        default=None,
        description="path on each host of a file with the secret key that authenticates chunks in Redis, readable "
        "only by its owner; none: the environment variable INFERTUNER_CHUNK_KEY, if set",
    )
    remote_deadline_ms: float = Field(
        default=100.0, gt=0, description="longest time that a request waits for chunks from Redis"
    )
    remote_ttl_s: int = Field(default=3600, ge=1, description="time to live of a chunk in Redis")
    remote_read_bytes: int = Field(
        default=4 * MIB, ge=1, description="maximum bytes to read from Redis in one round trip"
    )
    prefetch_bytes: int = Field(
        default=64 * MIB, ge=0, description="maximum bytes of chunks that are prefetched from Redis for queued requests"
    )
    remote_known_chunks: int = Field(
        default=65_536, ge=1, description="number of chunks to remember as present in Redis; they are not written again"
    )
    write_queue_bytes: int = Field(
        default=64 * MIB,
        ge=0,
        description="maximum bytes of chunks that wait to be written to Redis; a full queue drops new chunks",
    )
    write_flush_ms: float = Field(
        default=20.0, ge=0, description="longest time that a chunk waits to be written together with others"
    )
    breaker_failures: int = Field(
        default=3,
        ge=1,
        description="number of failures in a row after which the circuit breaker stops requests to Redis",
    )
    breaker_open_ms: float = Field(
        default=2000.0, gt=0, description="time until the circuit breaker lets one request try Redis again"
    )


class CacheConfig(Config):
    """The two-level key/value cache of a slot."""

    cache: bool = Field(default=True, description="reuse key/value chunks of earlier requests")
    chunk_tokens: int = Field(
        default=32, ge=1, le=4096, description="number of tokens in a chunk, the unit of the cache"
    )
    eviction: Annotated[str, EVICTION] = Field(default="LRU", description="eviction policy of the local tier")
    sizing: SizingConfig = SizingConfig()
    remote: RemoteConfig = RemoteConfig()

"""Options of the cache: its two tiers, and the policies of the local one."""

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from cache.registry import EVICTION, SIZING
from core.config import Config, HostFile
from core.redis_config import RedisAccessConfig, RedisUrl

MIB = 1 << 20


class MrcGoal(StrEnum):
    """What the strategy MRC reads off its curve."""

    HIT_RATE = "hit_rate"
    """The smallest capacity that reaches a hit rate."""
    PRICE = "price"
    """The greatest capacity at which every chunk still gains its price."""


class RemoteCodec(StrEnum):
    """What a chunk is in Redis."""

    RAW = "raw"
    """Its tensor, bit by bit."""
    INT8 = "int8"
    """Eight bits a number, with scales: close to the tensor, not equal to it."""


class SizingConfig(Config):
    """The local tier's capacity in chunks, and the parameters of the policies that change it."""

    strategy: Annotated[str, SIZING] = Field(default="STATIC", description="sizing policy of the local tier")
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

    @property
    def shares_budget(self) -> bool:
        """Whether the capacity is a share of `budget_chunks`, which needs the curve that MRC keeps."""
        return self.budget_chunks is not None and self.strategy == "MRC"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_capacity_chunks > self.max_capacity_chunks:
            raise ValueError("min_capacity_chunks is above max_capacity_chunks; swap them")
        return self


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
    eviction: Annotated[str, EVICTION] = Field(default="LRU", description="eviction policy of the local tier")
    sizing: SizingConfig = SizingConfig()
    remote: RemoteConfig = RemoteConfig()

"""Shares the queue lengths of slots with the decode operators, which place sessions.

The lengths go through Redis because slots may be on several hosts, and Flink's streams do not flow backwards. If Redis
fails, the lengths are unknown, and sessions go to their default slots.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from redis import Redis
from redis.exceptions import RedisError

from core.clients import FROM_ENVIRONMENT, redis_settings
from core.redis_config import RedisAccessConfig
from operators.config import JobConfig, Placement
from operators.shared_state.periodic import Periodic

STALE_MS = 2000
"""Lifetime of a slot's report."""
TIMEOUT_S = 0.5


class SharedLoads:
    """Queue lengths in ms by slot, in Redis. `name` must be unique to the job."""

    def __init__(self, redis_url: str, name: str, slots: int, access: RedisAccessConfig = FROM_ENVIRONMENT) -> None:
        self._redis = Redis.from_url(
            redis_url, **redis_settings(redis_url, access), socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S
        )
        self._keys = [f"{name}:queue:{slot}" for slot in range(slots)]

    @classmethod
    def of(cls, config: JobConfig) -> "SharedLoads | None":
        """The shared loads of the job. None if sessions stay at their default slots, or there is no Redis."""
        remote = config.cache.remote
        if config.placing.placement is not Placement.BALANCED or remote.redis_url is None or config.parallelism == 1:
            return None
        name = f"{remote.redis_namespace}:{config.job_name}:{config.kafka.consumer_group}"
        return cls(remote.redis_url, name, config.parallelism, remote.access)

    def write(self, slot: int, queue_ms: float) -> None:
        self._redis.set(self._keys[slot], f"{queue_ms:.0f}", px=STALE_MS)

    def read(self) -> dict[int, float]:
        """Queueing times in ms by slot, of the slots that reported within `STALE_MS`."""
        values: Any = self._redis.mget(self._keys)
        return {slot: float(value) for slot, value in enumerate(values) if value is not None}

    def close(self) -> None:
        self._redis.close()


class Loads(Protocol):
    """The known queue lengths of slots."""

    @property
    def queues_ms(self) -> Mapping[int, float]:
        """By slot. Every update makes a new mapping."""
        ...


class LoadReader:
    """The loads as its thread read them last."""

    def __init__(self, shared: SharedLoads) -> None:
        self._shared = shared
        self.queues_ms: Mapping[int, float] = {}
        self._periodic = Periodic("load-view", self._refresh)

    def close(self) -> None:
        self._periodic.close()
        self._shared.close()

    def _refresh(self) -> None:
        try:
            self.queues_ms = self._shared.read()
        except (RedisError, ValueError):
            self.queues_ms = {}
            raise


class LoadReporter:
    """Writes the result of `queue_ms` for one slot, in a thread of its own."""

    def __init__(self, shared: SharedLoads, slot: int, queue_ms: Callable[[], float]) -> None:
        self._shared = shared
        self._periodic = Periodic("load-report", lambda: shared.write(slot, queue_ms()))

    def close(self) -> None:
        self._periodic.close()
        self._shared.close()

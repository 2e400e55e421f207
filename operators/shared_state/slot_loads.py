"""How long each slot's queue is, told to those who place sessions.

It goes by way of Redis, as a job's slots may be on several hosts and Flink's streams lead nowhere backwards. Whatever
fails on the way leaves a slot's length unknown, and sessions at home.
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
"""What a slot has said is forgotten after this."""
TIMEOUT_S = 0.5


class SharedLoads:
    """Queue lengths in ms by slot, in Redis, under a name that no other job has."""

    def __init__(self, redis_url: str, name: str, slots: int, access: RedisAccessConfig = FROM_ENVIRONMENT) -> None:
        self._redis = Redis.from_url(
            redis_url, **redis_settings(redis_url, access), socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S
        )
        self._keys = [f"{name}:queue:{slot}" for slot in range(slots)]

    @classmethod
    def of(cls, config: JobConfig) -> "SharedLoads | None":
        """The job's shared; none where sessions stay at home anyway, or without Redis to carry their chunks along."""
        remote = config.cache.remote
        if config.placing.placement is not Placement.BALANCED or remote.redis_url is None or config.parallelism == 1:
            return None
        name = f"{remote.redis_namespace}:{config.job_name}:{config.kafka.consumer_group}"
        return cls(remote.redis_url, name, config.parallelism, remote.access)

    def write(self, slot: int, queue_ms: float) -> None:
        self._redis.set(self._keys[slot], f"{queue_ms:.0f}", px=STALE_MS)

    def read(self) -> dict[int, float]:
        """Queueing times in ms of the slots that have reported lately, by slot."""
        values: Any = self._redis.mget(self._keys)
        return {slot: float(value) for slot, value in enumerate(values) if value is not None}

    def close(self) -> None:
        self._redis.close()


class Loads(Protocol):
    """What is known of the slots' queues."""

    @property
    def queues_ms(self) -> Mapping[int, float]:
        """A new mapping whenever something new is known."""
        ...


class LoadReader:
    """The shared as it was read last, by a thread of its own."""

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
    """Writes what `queue_ms` says of one slot to the shared, by a thread of its own."""

    def __init__(self, shared: SharedLoads, slot: int, queue_ms: Callable[[], float]) -> None:
        self._shared = shared
        self._periodic = Periodic("load-report", lambda: shared.write(slot, queue_ms()))

    def close(self) -> None:
        self._periodic.close()
        self._shared.close()

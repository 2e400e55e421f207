"""Redis as a cache: bounded memory, LRU eviction, nothing written to disk."""

import os

from redis import Redis
from redis.exceptions import RedisError

from core.clients import redis_settings
from core.credentials import in_one_line
from local_stack.config import HOST, StackConfig
from local_stack.processes import Started, launch
from local_stack.service import PROBE_TIMEOUT_S, NotReady, program


class RedisService:
    name = "Redis"
    address_option = "--redis-url"
    processes: tuple[str, ...] = ("redis",)

    def __init__(self, config: StackConfig) -> None:
        self._config = config
        self.own = config.redis_url is None
        self.address = config.redis_url or f"redis://{HOST}:{config.redis_port}/0"

    def ports(self) -> dict[str, int]:
        return {"--redis-port": self._config.redis_port} if self.own else {}

    def launch(self, process: str) -> Started:
        config = self._config
        argv = [program("redis-server"), "--bind", HOST, "--port", str(config.redis_port)]
        argv += ["--maxmemory", f"{config.redis_max_memory_mb}mb", "--maxmemory-policy", "allkeys-lru"]
        argv += ["--save", "", "--appendonly", "no", "--dir", str(config.dir)]
        return launch(self.name, process, argv, os.environ, config.dir / "log")

    def probe(self) -> None:
        try:
            with Redis.from_url(
                self.address,
                **redis_settings(self.address, self._config.redis_access),
                socket_timeout=PROBE_TIMEOUT_S,
                socket_connect_timeout=PROBE_TIMEOUT_S,
            ) as client:
                client.ping()
        except (RedisError, OSError, ValueError) as error:
            raise NotReady(in_one_line(error)) from None

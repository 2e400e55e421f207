"""Checks of a configuration when a job is submitted. Imports neither PyTorch nor transformers."""

from redis import Redis
from redis.exceptions import RedisError

from cache.config import RemoteConfig
from cache.redis_wire import RedisAddress
from core.clients import redis_settings
from core.errors import UserError
from inference_service.device_profile import DeviceProfile
from operators.config import JobConfig

_REDIS_TIMEOUT_S = 2.0


def check_before_start(config: JobConfig) -> None:
    """Raise `UserError` for a configuration that no slot can start with. `operators.job_files` checks the model."""
    if config.engine.profile is not None:
        DeviceProfile.read(config.engine.profile)
    if config.cache.remote.redis_url is not None:
        _check_redis(config.cache.remote.redis_url, config.cache.remote)
    elif config.cache.sizing.budget_chunks is not None and config.parallelism > 1:
        raise UserError("--budget-chunks: slots share it through Redis; add --redis-url, or leave it out")


def _check_redis(url: str, remote: RemoteConfig) -> None:
    """Raise `UserError` for an invalid URL, and for a Redis in cluster mode.

    A Redis that cannot be reached from this host is not an error: slots work without it, and try again.
    """
    address = RedisAddress.parse(url)
    try:
        settings = redis_settings(url, remote.access)
        timeouts = {"socket_timeout": _REDIS_TIMEOUT_S, "socket_connect_timeout": _REDIS_TIMEOUT_S}
        with Redis.from_url(url, **settings, **timeouts) as client:
            is_cluster = client.info("cluster").get("cluster_enabled") == 1
    except (RedisError, OSError, UserError):
        return
    if is_cluster:
        raise UserError(
            f"redis_url: Redis at {address} runs in cluster mode, which is not supported; name a Redis without it"
        )

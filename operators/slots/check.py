"""What no slot could start with, told where the job is submitted; loads no library that computes."""

from cache.redis_wire import RedisAddress
from core.config import JobConfig
from core.errors import UserError
from inference_service.device_profile import DeviceProfile


def check_before_start(config: JobConfig) -> None:
    """Raises `UserError`. That a model's folder is there is seen to by `core.model_path`."""
    if config.engine.profile is not None:
        DeviceProfile.read(config.engine.profile)
    if config.cache.remote.redis_url is not None:
        RedisAddress.parse(config.cache.remote.redis_url)
    elif config.cache.sizing.budget_chunks is not None and config.parallelism > 1:
        raise UserError("--budget-chunks: slots share it by way of Redis; add --redis-url, or leave it out")

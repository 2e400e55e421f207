"""Kafka, Redis and Flink for an experiment: the user's own, or the local stack while the experiment runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from redis import Redis
from redis.exceptions import RedisError
from rich.console import Console

from core.clients import redis_settings
from core.credentials import in_one_line
from core.errors import UserError
from core.kafka_config import KafkaSecurity
from core.redis_config import RedisAccessConfig
from experiments.config import ROOT, RunConfig
from experiments.flink_job import FlinkCluster
from experiments.kafka_topics import require_broker
from local_stack import LocalStack, StackConfig, flink_cli
from operators.config import JobConfig

TASK_MANAGERS = 2


@dataclass(frozen=True)
class Services:
    brokers: str
    redis_url: str | None
    flink: FlinkCluster


@contextmanager
def services(run: RunConfig, job: JobConfig) -> Iterator[Services]:
    """Give services that answer. Afterwards, stop exactly those that were started here.

    Raises `UserError` if a service of the user does not answer, or the cluster has fewer slots than `job` needs.
    """
    stack = _stack(run, job)
    ran_before = _runs(stack)
    try:
        with Console(stderr=True).status("starting Kafka, Redis and Flink ..."):
            stack.start()
        addresses = stack.addresses()
        argv, env = flink_cli(stack)
        flink = FlinkCluster(addresses.flink_rest_url, argv, env, ROOT)
        require_broker(job.kafka.model_copy(update={"brokers": addresses.brokers}))
        if run.remote:
            _require_redis(addresses.redis_url, job.cache.remote.access)
        if (slots := flink.slots()) < job.parallelism:
            raise UserError(
                f"{job.parallelism} slots are needed and Flink has {slots}; lower the parallelism, or give Flink more"
            )
        yield Services(addresses.brokers, addresses.redis_url if run.remote else None, flink)
    finally:
        # Found out before the start: an interruption of `start` could lose its result.
        if not ran_before:
            stack.stop()


def _stack(run: RunConfig, job: JobConfig) -> LocalStack:
    own: dict[str, Any] = {
        # Only if it was given: the job's default names a broker too.
        "brokers": job.kafka.brokers if "brokers" in job.kafka.model_fields_set else None,
        "redis_url": job.cache.remote.redis_url,
        "flink_url": run.flink_url,
    }
    access: dict[str, Any] = {"redis_access": job.cache.remote.access, "kafka_access": job.kafka.access}
    directory = run.stack_dir
    if any(own.values()):
        # These options differ from the local stack's, so a separate folder keeps the two apart.
        directory = directory.with_name(directory.name + "-own")
    elif running := LocalStack.running_in(directory):
        return running
    if job.kafka.access.kafka_security is not KafkaSecurity.PLAINTEXT and own["brokers"] is None:
        raise UserError("--kafka-security: needs your own Kafka; name it with --brokers, or leave this out")
    slots = max(StackConfig.model_fields["task_slots"].default, -(-job.parallelism // TASK_MANAGERS))
    return LocalStack(StackConfig(dir=directory, task_managers=TASK_MANAGERS, task_slots=slots, **own, **access))


def _runs(stack: LocalStack) -> bool:
    return LocalStack.running_in(stack.config.dir) is not None and not any(part.problem for part in stack.health())


def _require_redis(url: str, access: RedisAccessConfig) -> None:
    settings = redis_settings(url, access)
    try:
        with Redis.from_url(url, **settings, socket_timeout=5, socket_connect_timeout=5) as client:
            client.ping()
    except (RedisError, OSError, ValueError) as error:
        raise UserError(f"--redis-url: Redis does not answer ({in_one_line(error)}); is it running?") from None

"""Options of the local stack, which `scripts/cluster.sh` starts."""

import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from core.config import Config, HostFile
from core.kafka_config import KafkaAccessConfig, KafkaSecurity
from core.redis_config import RedisAccessConfig, RedisUrl

HOST = "127.0.0.1"
ROOT = Path(__file__).resolve().parent.parent
JARS = ROOT / ".local" / "jars"
LIGHT_JAVA = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
"""JVM options for a machine with few cores. The optimizing compiler and parallel garbage collectors would take those
cores from starting jobs and engines for minutes. These options cost peak speed, which the local stack does not need."""

Port = Annotated[int, Field(ge=1, le=65_535)]
HostPort = Annotated[str, Field(pattern=r"^[^\s:,/]+:\d{1,5}(,[^\s:,/]+:\d{1,5})*$")]


class StackConfig(Config):
    """The local stack. A service whose address is given is used and not started."""

    dir: Path = Field(default=ROOT / ".local" / "stack", description="folder of all data, logs and state of the stack")
    brokers: HostPort | None = Field(default=None, description="HOST:PORT of your own Kafka")
    redis_url: RedisUrl | None = Field(
        default=None, pattern=r"^rediss?://\S+$", description="redis://HOST:PORT/DB of your own Redis"
    )
    redis_access: RedisAccessConfig = RedisAccessConfig()
    kafka_access: KafkaAccessConfig = KafkaAccessConfig()
    flink_url: str | None = Field(
        default=None, pattern=r"^http://[^\s:/]+:\d{1,5}/?$", description="http://HOST:PORT of your own Flink"
    )

    kafka_port: Port = Field(default=9092, description="port of Kafka")
    kafka_controller_port: Port = Field(default=9093, description="port of Kafka's controller")
    kafka_properties: HostFile | None = Field(
        default=None,
        description="file with further Kafka settings, which override those of the stack; kafka_security needs "
        "some at the broker",
    )
    kafka_heap_mb: int = Field(default=512, ge=128, description="heap size of Kafka")
    redis_port: Port = Field(default=6379, description="port of Redis")
    redis_max_memory_mb: int = Field(
        default=512, ge=1, description="maximum memory of Redis; when it is full, Redis evicts by LRU"
    )
    flink_port: Port = Field(default=8081, description="port of Flink's REST interface and web page")
    flink_rpc_port: Port = Field(default=6123, description="port of Flink's JobManager")
    job_manager_mb: int = Field(default=1024, ge=768, description="total memory of the JobManager")
    task_managers: int = Field(default=2, ge=1, le=64, description="number of TaskManager processes")
    task_slots: int = Field(default=2, ge=1, le=128, description="number of task slots in each TaskManager")
    task_manager_mb: int = Field(
        default=1280, ge=1024, description="memory of one TaskManager's JVM, without its Python workers"
    )

    high_availability: bool = Field(
        default=False, description="start a ZooKeeper, so that a restarted JobManager recovers its jobs"
    )
    zookeeper_port: Port = Field(default=2181, description="port of the ZooKeeper")

    start_timeout_s: float = Field(default=240.0, gt=0, description="longest time to wait until all services answer")
    stop_grace_s: float = Field(default=10.0, ge=0, description="time that a process gets to stop before it is killed")

    @model_validator(mode="after")
    def _broker_knows_its_security(self) -> Self:
        if self.kafka_access.kafka_security is not KafkaSecurity.PLAINTEXT and not (
            self.brokers or self.kafka_properties
        ):
            raise ValueError(
                "kafka_security is set up at the broker; name yours with --brokers, or its settings with "
                "--kafka-properties"
            )
        return self

    @classmethod
    def on_free_ports(cls, directory: Path, **fields: Any) -> Self:
        """A stack in `directory`, on ports that are free now."""
        names = ("kafka_port", "kafka_controller_port", "redis_port", "flink_port", "flink_rpc_port", "zookeeper_port")
        return cls(dir=directory, **(dict(zip(names, _free_ports(), strict=False)) | fields))


def port_is_free(port: int) -> bool:
    """True if a server could listen on `port` of the loopback interface."""
    with socket.socket() as probe:
        # Servers do the same. A recently closed connection must not make the port count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _free_ports() -> Iterator[int]:
    # Below Linux's ephemeral range, so no outgoing connection takes the port before its server does.
    candidates = random.SystemRandom().sample(range(15_000, 32_000), 2_000)
    return (port for port in candidates if port_is_free(port))

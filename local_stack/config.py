"""What the local stack consists of, and where: every option of `scripts/cluster.sh` with its default."""

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
"""For a JVM that shares few cores with what it serves: the optimizing compiler and parallel collectors would take them
for minutes, from starting jobs and from engines. What it costs is peak speed that this stack has no use for."""

Port = Annotated[int, Field(ge=1, le=65_535)]
HostPort = Annotated[str, Field(pattern=r"^[^\s:,/]+:\d{1,5}(,[^\s:,/]+:\d{1,5})*$")]


class StackConfig(Config):
    """The local stack. A part whose address is given is used as it is and not started."""

    dir: Path = Field(default=ROOT / ".local" / "stack", description="folder of all its data, logs and state")
    brokers: HostPort | None = Field(default=None, description="HOST:PORT of a Kafka of your own")
    redis_url: RedisUrl | None = Field(
        default=None, pattern=r"^rediss?://\S+$", description="redis://HOST:PORT/DB of a Redis of your own"
    )
    redis_access: RedisAccessConfig = RedisAccessConfig()
    kafka_access: KafkaAccessConfig = KafkaAccessConfig()
    flink_url: str | None = Field(
        default=None, pattern=r"^http://[^\s:/]+:\d{1,5}/?$", description="http://HOST:PORT of a Flink of your own"
    )

    kafka_port: Port = Field(default=9092, description="port of Kafka")
    kafka_controller_port: Port = Field(default=9093, description="port of Kafka's controller")
    kafka_properties: HostFile | None = Field(
        default=None,
        description="file of further settings of Kafka, which override ours: what kafka_security needs at the broker",
    )
    kafka_heap_mb: int = Field(default=512, ge=128, description="heap of Kafka")
    redis_port: Port = Field(default=6379, description="port of Redis")
    redis_max_memory_mb: int = Field(default=512, ge=1, description="what Redis may hold; beyond, it evicts by LRU")
    flink_port: Port = Field(default=8081, description="port of Flink's REST interface and web page")
    flink_rpc_port: Port = Field(default=6123, description="port of Flink's JobManager")
    job_manager_mb: int = Field(default=1024, ge=768, description="memory of the JobManager, all in all")
    task_managers: int = Field(default=2, ge=1, le=64, description="TaskManager processes")
    task_slots: int = Field(default=2, ge=1, le=128, description="slots of each TaskManager")
    task_manager_mb: int = Field(
        default=1280, ge=1024, description="memory of one TaskManager's JVM; its Python workers come on top"
    )

    high_availability: bool = Field(
        default=False, description="with a ZooKeeper: a JobManager that has died and is started again recovers its jobs"
    )
    zookeeper_port: Port = Field(default=2181, description="port of that ZooKeeper")

    start_timeout_s: float = Field(default=240.0, gt=0, description="longest to wait until everything answers")
    stop_grace_s: float = Field(default=10.0, ge=0, description="time to end by itself before a process is killed")

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
        """A stack below `directory` on ports that nobody listens on at this moment."""
        names = ("kafka_port", "kafka_controller_port", "redis_port", "flink_port", "flink_rpc_port", "zookeeper_port")
        return cls(dir=directory, **(dict(zip(names, _free_ports(), strict=False)) | fields))


def port_is_free(port: int) -> bool:
    """Whether a server could listen on `port` of the loopback interface."""
    with socket.socket() as probe:
        # As servers do: a connection that was closed a moment ago must not count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _free_ports() -> Iterator[int]:
    # Below Linux's ephemeral range: no outgoing connection can take the port before its server does.
    candidates = random.SystemRandom().sample(range(15_000, 32_000), 2_000)
    return (port for port in candidates if port_is_free(port))

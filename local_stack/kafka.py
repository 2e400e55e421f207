"""Kafka as a single node: broker and controller in one JVM, from the jars that scripts/setup.sh installs."""

import os
import shutil
import socket
import subprocess
from pathlib import Path

from kafka import KafkaAdminClient
from kafka.errors import KafkaError

from core.clients import kafka_settings
from core.credentials import in_one_line
from core.errors import UserError
from local_stack.config import HOST, JARS, LIGHT_JAVA, StackConfig
from local_stack.processes import Started, launch
from local_stack.service import PROBE_TIMEOUT_S, NotReady, program

CLUSTER_ID = "aW5mZXJ0dW5lci1sb2NhbA"

PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{host}:{controller_port}
controller.listener.names=CONTROLLER
listeners=CLIENTS://{host}:{port},CONTROLLER://{host}:{controller_port}
advertised.listeners=CLIENTS://{host}:{port}
listener.security.protocol.map=CLIENTS:{security},CONTROLLER:PLAINTEXT
inter.broker.listener.name=CLIENTS
log.dirs={data}

# One node can have only one replica.
default.replication.factor=1
min.insync.replicas=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=4

# Clients create their topics with the partitions they need; a misspelt name is an error.
auto.create.topics.enable=false
message.max.bytes=2097152
replica.fetch.max.bytes=2097152
log.retention.hours=24
log.retention.bytes=1073741824
log.segment.bytes=134217728
# Only our consumers use it, so a group need not wait for others to join.
group.initial.rebalance.delay.ms=0
"""

LOGGING = """\
status=error
appender.out.type=Console
appender.out.name=out
appender.out.layout.type=PatternLayout
appender.out.layout.pattern=%d %p %c{1}: %m%n
rootLogger.level=warn
rootLogger.appenderRef.out.ref=out
logger.server.name=kafka.server
logger.server.level=info
"""


class KafkaService:
    name = "Kafka"
    address_option = "--brokers"
    processes: tuple[str, ...] = ("kafka",)

    def __init__(self, config: StackConfig) -> None:
        self._config = config
        self._dir = config.dir / "kafka"
        self.own = config.brokers is None
        self.address = config.brokers or f"{HOST}:{config.kafka_port}"

    def ports(self) -> dict[str, int]:
        if not self.own:
            return {}
        return {
            "--kafka-port": self._config.kafka_port,
            "--kafka-controller-port": self._config.kafka_controller_port,
        }

    def launch(self, process: str) -> Started:
        self._write_properties()
        self._format_once()
        argv = self._java(f"-Xmx{self._config.kafka_heap_mb}m", "-XX:+ExitOnOutOfMemoryError")
        argv += ["kafka.Kafka", self._properties]
        return launch(self.name, process, argv, os.environ, self._config.dir / "log")

    def probe(self) -> None:
        host, _, port = self.address.split(",")[0].rpartition(":")
        try:
            # Try a plain connection first, because the client would log every refusal.
            socket.create_connection((host, int(port)), timeout=PROBE_TIMEOUT_S).close()
            admin = KafkaAdminClient(
                **kafka_settings(self.address, self._config.kafka_access),
                request_timeout_ms=int(PROBE_TIMEOUT_S * 1000),
                bootstrap_timeout_ms=int(PROBE_TIMEOUT_S * 1000),
            )
            try:
                admin.list_topics()
            finally:
                admin.close()
        except (KafkaError, OSError, OverflowError) as error:
            raise NotReady(in_one_line(error)) from None

    @property
    def _properties(self) -> str:
        return str(self._dir / "server.properties")

    def _write_properties(self) -> None:
        self._dir.mkdir(parents=True, exist_ok=True)
        ours = PROPERTIES.format(
            host=HOST,
            port=self._config.kafka_port,
            controller_port=self._config.kafka_controller_port,
            data=self._dir / "data",
            security=self._config.kafka_access.kafka_security,
        )
        further = self._config.kafka_properties
        written = Path(self._properties)
        written.touch(mode=0o600)
        written.chmod(0o600)  # The settings may contain users' passwords.
        written.write_text(ours + ("" if further is None else further.read_text()))
        (self._dir / "log4j2.properties").write_text(LOGGING)

    def _format_once(self) -> None:
        # This mark is written last, so that an interrupted formatting is not taken for a complete storage.
        formatted = self._dir / "formatted"
        if formatted.exists():
            return
        shutil.rmtree(self._dir / "data", ignore_errors=True)
        done = subprocess.run(
            [
                *self._java(),
                *("kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", self._properties),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise UserError(f"Kafka's storage in {self._dir} cannot be formatted\n{done.stdout}{done.stderr}".rstrip())
        formatted.touch()

    def _java(self, *options: str) -> list[str]:
        jars = JARS / "broker"
        if not jars.is_dir():
            raise UserError(f"{jars} is missing; run scripts/setup.sh")
        logging = self._dir / "log4j2.properties"
        return [program("java"), *LIGHT_JAVA, *options, f"-Dlog4j2.configurationFile={logging}", "-cp", f"{jars}/*"]

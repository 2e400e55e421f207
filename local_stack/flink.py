"""Flink from the pip package as a standalone cluster: one JobManager and some TaskManagers, all on loopback.

With high availability, the ZooKeeper of the same package runs too. A restarted JobManager finds its jobs there, and
resumes them from their last checkpoints.
"""

import http.client
import importlib.util
import json
import os
import shutil
import socket
import sys
import urllib.request
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from ruamel.yaml import YAML

from core.errors import UserError
from local_stack.config import HOST, JARS, LIGHT_JAVA, StackConfig
from local_stack.processes import Started, launch
from local_stack.service import PROBE_TIMEOUT_S, NotReady

# Ignores proxies of the environment, which could not reach this machine's loopback.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))

LOGGING = """\
status=error
appender.file.type=RollingFile
appender.file.name=file
appender.file.fileName=${sys:log.file}
appender.file.filePattern=${sys:log.file}.%i
appender.file.layout.type=PatternLayout
appender.file.layout.pattern=%d %-5p %c{1.} - %m%n
appender.file.policies.type=Policies
appender.file.policies.size.type=SizeBasedTriggeringPolicy
appender.file.policies.size.size=50MB
appender.file.strategy.type=DefaultRolloverStrategy
appender.file.strategy.max=2
rootLogger.level=info
rootLogger.appenderRef.file.ref=file
# These fill the log with warnings and with every job's whole configuration.
logger.consumer.name=org.apache.kafka.clients.consumer.ConsumerConfig
logger.consumer.level=error
logger.producer.name=org.apache.kafka.clients.producer.ProducerConfig
logger.producer.level=error
logger.admin.name=org.apache.kafka.clients.admin.AdminClientConfig
logger.admin.level=error
"""


ZOOKEEPER = """\
tickTime=1000
dataDir={data}
clientPortAddress={host}
clientPort={port}
admin.enableServer=false
"""
ZOOKEEPER_HEAP_MB = 64
SESSION_TIMEOUT = "6 s"
"""ZooKeeper declares a JobManager dead after this silence; then another may lead. ZooKeeper allows 2 to 20 ticks."""
SCRIPTS = {"zookeeper": "zookeeper.sh", "jobmanager": "jobmanager.sh", "taskmanager": "taskmanager.sh"}


class FlinkService:
    name = "Flink"
    address_option = "--flink-url"

    def __init__(self, config: StackConfig) -> None:
        self._config = config
        self._dir = config.dir / "flink"
        self.own = config.flink_url is None
        self.address = (config.flink_url or f"http://{HOST}:{config.flink_port}").rstrip("/")
        self.home = _flink_home()
        self.conf_dir = self._dir / "conf"
        self.processes = (
            *(("zookeeper",) if config.high_availability else ()),
            "jobmanager",
            *(f"taskmanager-{number}" for number in range(1, config.task_managers + 1)),
        )

    def ports(self) -> dict[str, int]:
        if not self.own:
            return {}
        ports = {"--flink-port": self._config.flink_port, "--flink-rpc-port": self._config.flink_rpc_port}
        return ports | ({"--zookeeper-port": self._config.zookeeper_port} if self._config.high_availability else {})

    def launch(self, process: str) -> Started:
        kind = process.partition("-")[0]
        argv = ["bash", str(self.home / "bin" / SCRIPTS[kind]), "start-foreground"]
        if kind == "zookeeper":
            argv += ["1"]
        else:
            tmp = self._dir / "tmp" / process
            # A killed process could not delete these files.
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)
            argv += ["-D", f"io.tmp.dirs={tmp}"]
        if kind == "taskmanager":
            # With the same name it replaces a killed one at once. Otherwise the JobManager would send tasks to the
            # killed one until enough heartbeats are missing.
            argv += ["-D", f"taskmanager.resource-id={process}"]
        # Flink names its logs by this value, so each process has its own log.
        env = self.environment() | {"FLINK_IDENT_STRING": process}
        return launch(self.name, process, argv, env, self._config.dir / "log", log=f"flink-{process}-*.log")

    def probe(self) -> None:
        try:
            slots = self._get("/overview")["slots-total"]
            managers = self._get("/taskmanagers")["taskmanagers"] if self.own else []
            for manager in managers:
                # A dead one is listed until enough heartbeats are missing.
                place = urlsplit(manager["path"])
                socket.create_connection((place.hostname, place.port), timeout=PROBE_TIMEOUT_S).close()
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            raise NotReady(f"{type(error).__name__}: {error}") from None
        wanted = self._config.task_managers * self._config.task_slots
        if self.own and slots < wanted:
            raise NotReady(f"{slots} of {wanted} slots, {len(managers)} of {self._config.task_managers} TaskManagers")

    def _get(self, path: str) -> Any:
        with DIRECT.open(f"{self.address}{path}", timeout=PROBE_TIMEOUT_S) as answer:
            return json.load(answer)

    def forget_jobs(self) -> None:
        """Delete the stored jobs, so that the next JobManager does not recover jobs of an earlier stack."""
        for folder in ("zookeeper", "high-availability"):
            shutil.rmtree(self._dir / folder, ignore_errors=True)

    def write_client_files(self) -> None:
        """Write the configuration that the cluster and `flink run` share."""
        self.conf_dir.mkdir(parents=True, exist_ok=True)
        settings = self._client_settings() | (self._cluster_settings() if self.own else {})
        # A JSON value is a YAML value, and Flink reads flat keys.
        lines = [f"{key}: {json.dumps(value)}\n" for key, value in settings.items()]
        (self.conf_dir / "config.yaml").write_text("".join(lines))
        for name in ("log4j-console.properties", "log4j-cli.properties"):
            (self.conf_dir / name).write_text(LOGGING)
        zookeeper = ZOOKEEPER.format(data=self._dir / "zookeeper", host=HOST, port=self._config.zookeeper_port)
        (self.conf_dir / "zoo.cfg").write_text(zookeeper)
        self._link_libraries()

    def environment(self) -> dict[str, str]:
        """Environment for Flink's scripts, without FLINK_... variables of another installation."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLINK_", "_FLINK"))}
        return kept | {
            "FLINK_CONF_DIR": str(self.conf_dir),
            "FLINK_LIB_DIR": str(self._dir / "lib"),
            "FLINK_LOG_DIR": str(self._config.dir / "log"),
            "FLINK_PID_DIR": str(self._dir / "pid"),
        }

    def _client_settings(self) -> dict[str, Any]:
        url = urlsplit(self.address)
        return {
            "rest.address": url.hostname,
            "rest.port": url.port,
            "parallelism.default": 1,
            # The virtual environment's Python can import the project.
            "python.executable": sys.executable,
            "python.client.executable": sys.executable,
            "env.java.opts.all": " ".join((_packaged_java_options(self.home), *LIGHT_JAVA)),
        }

    def _cluster_settings(self) -> dict[str, Any]:
        config = self._config
        return {
            "rest.bind-address": HOST,
            "jobmanager.bind-host": HOST,
            "jobmanager.rpc.address": HOST,
            "jobmanager.rpc.port": config.flink_rpc_port,
            "jobmanager.memory.process.size": f"{config.job_manager_mb}m",
            "taskmanager.bind-host": HOST,
            "taskmanager.host": HOST,
            "taskmanager.memory.process.size": f"{config.task_manager_mb}m",
            # Our operators keep nothing in managed memory, but it lets the Python operators of a slot share one worker.
            "taskmanager.memory.managed.fraction": 0.1,
            "taskmanager.numberOfTaskSlots": config.task_slots,
            "taskmanager.load-balance.mode": "SLOTS",
            # TaskManagers start together with the JobManager. By default one that is ready first would wait 10 s.
            "cluster.registration.error-delay": "500 ms",
            "execution.checkpointing.storage": "filesystem",
            "execution.checkpointing.dir": (self._dir / "checkpoints").as_uri(),
            "execution.checkpointing.savepoint-dir": (self._dir / "savepoints").as_uri(),
            "io.tmp.dirs": str(self._dir / "tmp"),
        } | (self._high_availability_settings() if config.high_availability else {})

    def _high_availability_settings(self) -> dict[str, Any]:
        return {
            "high-availability.type": "zookeeper",
            "high-availability.zookeeper.quorum": f"{HOST}:{self._config.zookeeper_port}",
            "high-availability.zookeeper.client.session-timeout": SESSION_TIMEOUT,
            "high-availability.storageDir": (self._dir / "high-availability").as_uri(),
            # With high availability this replaces jobmanager.rpc.port.
            "high-availability.jobmanager.port": self._config.flink_rpc_port,
            "zookeeper.heap.mb": ZOOKEEPER_HEAP_MB,
        }

    def _link_libraries(self) -> None:
        # One folder has Flink's jars, its Python part and the connectors. It is on the class path of client, JobManager
        # and TaskManagers, so no job has to name or upload jars, or load their classes again. That would cost each job
        # 27 MB of a TaskManager's 256 MB of class memory.
        lib = self._dir / "lib"
        shutil.rmtree(lib, ignore_errors=True)
        lib.mkdir(parents=True)
        connectors = sorted((JARS / "connector").glob("*.jar"))
        if not connectors:
            raise UserError(f"{JARS / 'connector'} has no jar; run scripts/setup.sh")
        python = (self.home / "opt").glob("flink-python-*.jar")
        for jar in (*(self.home / "lib").glob("*.jar"), *python, *connectors):
            (lib / jar.name).symlink_to(jar)


class HasConfig(Protocol):
    """A stack that has been started, even if it is stopped now."""

    @property
    def config(self) -> StackConfig: ...


def flink_cli(stack: HasConfig) -> tuple[list[str], dict[str, str]]:
    """Return arguments and environment of Flink's command line for `stack`, which has been started.

    `argv + ["run", "-d", "-py", "job.py", "--option", "value"]` submits a job; `-d` returns when it is accepted.
    """
    service = FlinkService(stack.config)
    return ["bash", str(service.home / "bin" / "flink")], service.environment()


def _flink_home() -> Path:
    spec = importlib.util.find_spec("pyflink")
    if spec is None or spec.origin is None:
        raise UserError("the Python package apache-flink is not installed; run scripts/setup.sh")
    return Path(spec.origin).parent


def _packaged_java_options(home: Path) -> str:
    """Return the JVM options in Flink's package that open modules of the JDK, which Java 17 would deny otherwise."""
    packaged = YAML(typ="safe").load(home / "conf" / "config.yaml")
    return str(packaged["env"]["java"]["opts"]["all"])

"""The stack for chaos: two TaskManagers with one slot each, so that one survives a fault, and high availability."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from kafka import KafkaConsumer
from redis import Redis

from experiments.config import ROOT
from experiments.flink_job import FlinkCluster, FlinkJob
from experiments.services import Services
from local_stack import LocalStack, StackConfig, flink_cli
from local_stack.processes import Started, members
from operators.config import JobConfig
from tests.chaos.begins import BeginLog

WORKER = "pyflink.fn_execution.beam.beam_boot"
SLOT = "operators.slots.server"


def chaos_config(directory: Path) -> StackConfig:
    return StackConfig.on_free_ports(
        directory, task_managers=2, task_slots=1, high_availability=True, redis_max_memory_mb=256
    )


@dataclass
class RunningJob:
    """The job under test. If it is stopped and started again, another one replaces it."""

    config: JobConfig
    submitted: FlinkJob
    reader: KafkaConsumer
    """Consumer of its responses and dead letters."""
    begins: BeginLog


class ChaosStack:
    """A running local stack, with the operations that faults need."""

    def __init__(self, local: LocalStack) -> None:
        self.local = local
        addresses = local.addresses()
        self.brokers, self.redis_url = addresses.brokers, addresses.redis_url
        argv, env = flink_cli(local)
        self.flink = FlinkCluster(addresses.flink_rest_url, argv, env, ROOT)
        self.redis = Redis.from_url(self.redis_url, socket_timeout=10, socket_connect_timeout=5)
        self.checkpoints = local.config.dir / "flink" / "checkpoints"
        self.logs = local.config.dir / "log"

    @property
    def services(self) -> Services:
        return Services(self.brokers, self.redis_url, self.flink)

    def started(self, name: str) -> Started:
        """The process of this name: `taskmanager-1`, `jobmanager`, `kafka`, `redis`, ..."""
        return next(one for one in self.local.processes if one.name == name)

    def kill(self, name: str) -> None:
        os.kill(self.started(name).pid, signal.SIGKILL)

    def start_again(self) -> None:
        """Start the services that have died; return when all answer."""
        self.local.start()

    def python_processes(self, module: str) -> list[psutil.Process]:
        """Python processes below a TaskManager that run `module`, `WORKER` or `SLOT`, the oldest first."""
        found = [process for process in self._of_task_managers() if module in _command_line(process)]
        return sorted(found, key=lambda process: process.create_time())

    def log_lines(self, containing: str) -> int:
        """Number of lines of Flink's logs that contain the text."""
        return sum(
            containing in line
            for file in self.logs.glob("flink-*.log*")
            for line in file.read_text(errors="replace").splitlines()
        )

    def _of_task_managers(self) -> Iterator[psutil.Process]:
        for started in self.local.processes:
            if started.name.startswith("taskmanager"):
                yield from members(started)


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []

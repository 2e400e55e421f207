"""Memory of every process of a local stack and of the jobs on it, sampled by a thread."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import psutil
from redis import Redis
from redis.exceptions import RedisError

from core.clients import redis_settings
from local_stack import LocalStack
from local_stack.processes import Started, members

MIB = 1 << 20
PYTHON_KINDS = {"pyflink.fn_execution.beam.beam_boot": "worker", "operators.slots.server": "slot"}


@dataclass(frozen=True)
class Sample:
    """Memory of one process at one time."""

    at_s: float
    """Time since the sampling began."""
    process: str
    kind: str
    """`slot`, `worker`, `taskmanager`, `jobmanager`, `kafka`, `redis`, ..."""
    mib: float
    """Resident memory; for Redis the memory that it reports as used."""


@dataclass
class MemorySampler:
    """Samples every `every_s` seconds in its `with` block. A process that replaces another has a new name."""

    stack: LocalStack
    every_s: float
    samples: list[Sample] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._names: dict[tuple[int, float], tuple[str, str]] = {}
        self._counts: Counter[str] = Counter()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)

    def __enter__(self) -> "MemorySampler":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        began_s = time.monotonic()
        while True:
            at_s = time.monotonic() - began_s
            self.samples += [Sample(round(at_s, 2), name, kind, mib) for name, kind, mib in self._taken()]
            if self._closed.wait(max(0.0, began_s + (at_s // self.every_s + 1) * self.every_s - time.monotonic())):
                return

    def _taken(self) -> Iterator[tuple[str, str, float]]:
        for started in self.stack.processes:
            if started.service == "Redis":
                url = self.stack.addresses().redis_url
                with suppress(RedisError), Redis.from_url(url, **redis_settings(url), socket_timeout=2) as redis:
                    yield started.name, "redis", redis.info("memory")["used_memory"] / MIB
                continue
            for process in members(started):
                with suppress(psutil.NoSuchProcess):
                    if (named := self._named(started, process)) is not None:
                        yield *named, process.memory_info().rss / MIB

    def _named(self, started: Started, process: psutil.Process) -> tuple[str, str] | None:
        """Return name and kind; none for a shell that only starts a process."""
        identity = process.pid, process.create_time()
        if identity in self._names:
            return self._names[identity]
        kind = next((kind for module, kind in PYTHON_KINDS.items() if module in process.cmdline()), None)
        if process.name() == "java":
            self._names[identity] = started.name, started.name.partition("-")[0]
        elif kind is not None:
            name = f"{started.name} {kind}"
            self._counts[name] += 1
            self._names[identity] = f"{name} {self._counts[name]}", kind
        return self._names.get(identity)

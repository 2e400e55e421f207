"""Faults of the stack, one small class each.

`prepare` is called before the job is started, with `options` of the fault's own; `inject` does harm, `heal` undoes it
`hold_s` later, and `close` leaves the stack as it was found. `evidence` tells what shows that harm was done: a fault
that leaves no trace proves nothing.
"""

import os
import random
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from redis import Redis
from redis.exceptions import OutOfMemoryError

from core.errors import UserError
from core.options import to_options
from tests.chaos.proxy import SlowProxy
from tests.chaos.stack import SLOT, ChaosStack, RunningJob

MIB = 1 << 20


class Fault:
    """No fault: the baseline for the others."""

    hold_s = 0.0
    burst_factor = 1.0
    """Factor of the rate during the burst."""

    def __init__(self, stack: ChaosStack) -> None:
        self.stack = stack

    @property
    def options(self) -> dict[str, Any]:
        """Further options of the job, by field name."""
        return {}

    def prepare(self) -> None:
        pass

    def inject(self, run: RunningJob) -> None:
        pass

    def heal(self, run: RunningJob) -> None:
        pass

    def evidence(self, run: RunningJob) -> str:
        """Proof of the fault in a few words; empty if there is none."""
        return "nothing was done"

    def close(self) -> None:
        pass


class Burst(Fault):
    """The load is ten times as fast for a while."""

    burst_factor = 10.0

    def evidence(self, run: RunningJob) -> str:
        return f"{self.burst_factor:.0f} times the rate for a while"


class PythonKilled(Fault):
    """A Python process below a TaskManager is killed: a worker of Flink, or a slot's process."""

    def __init__(self, stack: ChaosStack, module: str, options: dict[str, Any] | None = None) -> None:
        super().__init__(stack)
        self._module = module
        self._options = options or {}
        self._killed = 0

    @property
    def options(self) -> dict[str, Any]:
        return self._options

    def inject(self, run: RunningJob) -> None:
        self._killed = self.stack.python_processes(self._module)[0].pid
        os.kill(self._killed, signal.SIGKILL)

    def evidence(self, run: RunningJob) -> str:
        pids = {process.pid for process in self.stack.python_processes(self._module)}
        return "another process took its place" if pids and self._killed not in pids else ""


class PartKilled(Fault):
    """A service of the stack is killed, and started again."""

    def __init__(self, stack: ChaosStack, name: str, hold_s: float) -> None:
        super().__init__(stack)
        self.hold_s = hold_s
        self._name = name
        self._killed = 0

    def inject(self, run: RunningJob) -> None:
        self._killed = self.stack.started(self._name).pid
        self.stack.kill(self._name)

    def heal(self, run: RunningJob) -> None:
        self.stack.start_again()

    def evidence(self, run: RunningJob) -> str:
        return "it was started again" if self.stack.started(self._name).pid != self._killed else ""


class Paused(Fault):
    """A process is paused by SIGSTOP, and continues `hold_s` later."""

    def __init__(self, stack: ChaosStack, pid: Callable[[], int], hold_s: float) -> None:
        super().__init__(stack)
        self.hold_s = hold_s
        self._pid = pid
        self._process: psutil.Process | None = None
        self._was = ""

    def inject(self, run: RunningJob) -> None:
        self._process = psutil.Process(self._pid())
        self._process.suspend()

    def heal(self, run: RunningJob) -> None:
        assert self._process is not None
        self._was = self._process.status()
        self._process.resume()

    def evidence(self, run: RunningJob) -> str:
        return f"it stood still for {self.hold_s:.0f} s" if self._was == psutil.STATUS_STOPPED else ""

    def close(self) -> None:
        if self._process is not None:
            with suppress(psutil.NoSuchProcess):
                self._process.resume()


class EngineHung(Fault):
    """The process of a slot is paused for ever; the watchdog has to notice."""

    TIMEOUT_S = 6.0

    def __init__(self, stack: ChaosStack) -> None:
        super().__init__(stack)
        self._hung: psutil.Process | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {"engine_timeout_s": self.TIMEOUT_S}

    def inject(self, run: RunningJob) -> None:
        self._hung = self.stack.python_processes(SLOT)[0]
        self._hung.suspend()

    def evidence(self, run: RunningJob) -> str:
        assert self._hung is not None
        return "it was replaced" if not self._hung.is_running() else ""

    def close(self) -> None:
        if self._hung is not None:
            with suppress(psutil.NoSuchProcess):
                self._hung.resume()


class RedisSlow(Fault):
    """Every piece of Redis' answers is delayed by ten times the normal duration of an answer."""

    hold_s = 8.0
    PINGS = 100

    def __init__(self, stack: ChaosStack) -> None:
        super().__init__(stack)
        address = urlsplit(stack.redis_url)
        assert address.hostname is not None
        assert address.port is not None
        self._proxy = SlowProxy((address.hostname, address.port))
        self._before_ms = self._slow_ms = 0.0

    @property
    def options(self) -> dict[str, Any]:
        return {"redis_url": f"redis://127.0.0.1:{self._proxy.port}/0"}

    def inject(self, run: RunningJob) -> None:
        self._before_ms = self._ping_ms()
        self._proxy.delay_s = 9 * self._before_ms / 1000
        self._slow_ms = self._ping_ms()

    def heal(self, run: RunningJob) -> None:
        self._proxy.delay_s = 0.0

    def evidence(self, run: RunningJob) -> str:
        slowed = self._slow_ms >= 9 * self._before_ms
        return f"PING took {self._before_ms:.2f} ms, then {self._slow_ms:.2f} ms" if slowed else ""

    def close(self) -> None:
        self._proxy.close()

    def _ping_ms(self) -> float:
        times_ms = []
        with Redis(port=self._proxy.port) as client:
            client.ping()
            for _ in range(self.PINGS):
                began_s = time.perf_counter()
                client.ping()
                times_ms.append(1000 * (time.perf_counter() - began_s))
        return statistics.median(times_ms)


class RedisFull(Fault):
    """Redis is full of other data, and evicts nothing."""

    hold_s = 6.0
    FOREIGN = "foreign"

    def __init__(self, stack: ChaosStack) -> None:
        super().__init__(stack)
        self._was: dict[str, str] = {}
        self._refused_before = 0

    def inject(self, run: RunningJob) -> None:
        redis: Any = self.stack.redis
        self._was = redis.config_get("maxmemory*")
        redis.config_set("maxmemory-policy", "noeviction")
        redis.config_set("maxmemory", str(redis.info("memory")["used_memory"] + MIB))
        with suppress(OutOfMemoryError):
            for number in range(1000):
                redis.set(f"{self.FOREIGN}:{number}", bytes(MIB // 16))
        self._refused_before = self._refused()

    def heal(self, run: RunningJob) -> None:
        self._refused_before, refused = 0, self._refused() - self._refused_before
        self._refusals = refused
        self._restore()

    def evidence(self, run: RunningJob) -> str:
        return f"Redis refused {self._refusals} writes of the job" if self._refusals else ""

    def close(self) -> None:
        self._restore()

    _refusals = 0

    def _refused(self) -> int:
        errors: Any = self.stack.redis.info("errorstats")
        return int(errors.get("errorstat_OOM", {}).get("count", 0))

    def _restore(self) -> None:
        redis = self.stack.redis
        if self._was:
            redis.config_set("maxmemory", self._was["maxmemory"])
            redis.config_set("maxmemory-policy", self._was["maxmemory-policy"])
        for key in redis.scan_iter(match=f"{self.FOREIGN}:*", count=1000):
            redis.unlink(key)


class RedisFlipped(Fault):
    """Bits of stored chunks are flipped all the time."""

    hold_s = 10.0
    EVERY_S = 0.02

    def __init__(self, stack: ChaosStack) -> None:
        super().__init__(stack)
        self._random = random.Random(0)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._flipped = 0
        self._deleted_before = 0

    def inject(self, run: RunningJob) -> None:
        self._deleted_before = self._deleted()
        self._thread = threading.Thread(target=self._flip, args=(run.config.cache.remote.redis_namespace,))
        self._thread.start()

    def heal(self, run: RunningJob) -> None:
        self.close()

    def evidence(self, run: RunningJob) -> str:
        found = self._deleted() - self._deleted_before
        return f"{self._flipped} bits flipped, {found} records found out and deleted" if self._flipped and found else ""

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _flip(self, namespace: str) -> None:
        redis: Any = self.stack.redis
        while not self._stop.is_set():
            for key in redis.scan_iter(match=f"{namespace}:{'[0-9a-f]' * 64}", count=1000):
                at = self._random.randrange(max(1, redis.strlen(key)))
                byte = redis.getrange(key, at, at)
                if byte:
                    redis.setrange(key, at, bytes([byte[0] ^ 1 << self._random.randrange(8)]))
                    self._flipped += 1
                if self._stop.wait(self.EVERY_S):
                    return
            self._stop.wait(self.EVERY_S)

    def _deleted(self) -> int:
        # While a job runs, only the cache unlinks keys, and only damaged ones.
        commands: Any = self.stack.redis.info("commandstats")
        return int(commands.get("cmdstat_unlink", {}).get("calls", 0))


class DiskFull(Fault):
    """The disk of the checkpoints is full: a small separate disk, filled to the last byte."""

    hold_s = 8.0
    SIZE_MIB = 32

    def __init__(self, stack: ChaosStack) -> None:
        super().__init__(stack)
        self._ballast = stack.checkpoints / "ballast"
        self._mounted = False
        self._failed_before = 0

    def prepare(self) -> None:
        self.stack.checkpoints.mkdir(parents=True, exist_ok=True)
        options = f"size={self.SIZE_MIB}m"
        argv = ["mount", "-t", "tmpfs", "-o", options, "chaos", str(self.stack.checkpoints)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(
                f"disk-full: a small disk cannot be mounted ({done.stderr.strip()}); be root, or leave the scenario out"
            )
        self._mounted = True

    def inject(self, run: RunningJob) -> None:
        self._failed_before = _checkpoints(run, "failed")
        with suppress(OSError), self._ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    def heal(self, run: RunningJob) -> None:
        self._ballast.unlink(missing_ok=True)

    def evidence(self, run: RunningJob) -> str:
        failed = _checkpoints(run, "failed") - self._failed_before
        return f"{failed} checkpoints failed" if failed else ""

    def close(self) -> None:
        if self._mounted:
            self._ballast.unlink(missing_ok=True)
            # Unmount lazily, because Flink may still delete its files there.
            subprocess.run(["umount", "--lazy", str(self.stack.checkpoints)], check=True)


class Rescaled(Fault):
    """The job is stopped with a savepoint, and resumed from it at another parallelism."""

    STOP_TIMEOUT_S = 60.0

    def __init__(self, stack: ChaosStack, script: Path, parallelism: int) -> None:
        super().__init__(stack)
        self._script = script
        self._parallelism = parallelism

    def inject(self, run: RunningJob) -> None:
        savepoint = run.submitted.suspend(self.STOP_TIMEOUT_S)
        run.config = run.config.model_copy(update={"parallelism": self._parallelism})
        run.submitted = self.stack.flink.submit(self._script, to_options(run.config), savepoint)

    def evidence(self, run: RunningJob) -> str:
        restored = _checkpoints(run, "restored")
        return f"restored at parallelism {self._parallelism}" if restored else ""


def _checkpoints(run: RunningJob, outcome: str) -> int:
    """Number of the job's checkpoints that `failed`, were `completed` or were `restored`."""
    counts = run.submitted.cluster.get(f"/jobs/{run.submitted.job_id}/checkpoints")["counts"]
    return int(counts[outcome])

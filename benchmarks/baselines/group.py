"""The processes of one baseline, as the benchmark sees them through their pipes."""

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Self

from benchmarks.baselines.worker import GO, STOP, Answers, Done, Order
from core.errors import UserError
from core.options import to_options
from experiments.config import ROOT
from inference_service.config import EngineConfig

END_TIMEOUT_S = 10.0


class Worker:
    """One process. The constructor starts it; it is ready when `ready` returns."""

    def __init__(
        self, module: str, engine: EngineConfig, batch: int, log: Path, timeout_s: float, *, zero_time: bool = False
    ) -> None:
        """Start `module` of this package, and append the output of the process to `log`.

        With `zero_time` it answers without its model.
        """
        self._module = module
        self._log = log
        self._timeout_s = timeout_s
        command = [sys.executable, "-m", f"{__package__}.{module}", f"--batch={batch}", *to_options(engine)]
        command += ["--zero-time"] if zero_time else []
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders: IO[str] = self._process.stdin
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    def ready(self) -> dict[str, Any]:
        """Wait until it is loaded and warm; return the facts about its model."""
        facts: dict[str, Any] = self._hear("ready")["facts"]
        return facts

    def prepare(self, order: Order) -> None:
        self._tell(order.model_dump_json())
        self._hear("prepared")

    def go(self) -> None:
        self._tell(GO)

    def stop(self) -> None:
        """End a load from topics, which has no end by itself."""
        self._tell(STOP)

    def done(self) -> Done:
        return Done.model_validate(self._hear("done")["done"])

    def require_alive(self) -> None:
        """Raises `UserError` with the last line of its log if the process has ended."""
        if self._process.poll() is not None:
            lines = self._log.read_text().strip().splitlines()
            raise UserError(f"baseline {self._module} has ended: {lines[-1] if lines else 'its log is empty'}")

    def close(self) -> None:
        """Close its input, which ends the process."""
        try:
            self._orders.close()
            self._process.wait(END_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()

    def _tell(self, line: str) -> None:
        try:
            self._orders.write(line + "\n")
            self._orders.flush()
        except OSError:
            self._process.wait()
            self.require_alive()
            raise

    def _hear(self, word: str) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=self._timeout_s)
        except queue.Empty:
            raise UserError(
                f"baseline {self._module} is silent for {self._timeout_s:.0f} s; allow more with --ready-timeout-s"
            ) from None
        if not line:
            self._process.wait()
            self.require_alive()
        said: dict[str, Any] = json.loads(line)
        if said["says"] != word:
            raise RuntimeError(f"baseline {self._module} says {said['says']!r} where {word!r} is due")
        return said

    def _read(self, stdout: IO[str]) -> None:
        for line in stdout:
            self._lines.put(line)
        self._lines.put("")


class WorkerGroup:
    """Workers that share a load."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = tuple(workers)

    def answer(self, orders: Sequence[Order]) -> tuple[float, Answers]:
        """Send one order to each worker; return seconds to the last answer of all, and the answers."""
        for worker, order in zip(self.workers, orders, strict=True):
            worker.prepare(order)
        began_s = time.monotonic()
        for worker in self.workers:
            worker.go()
        done = [worker.done() for worker in self.workers]
        answers = {request_id: tokens for one in done for request_id, tokens in one.answers.items()}
        return max(one.ended_s for one in done) - began_s, answers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.close()

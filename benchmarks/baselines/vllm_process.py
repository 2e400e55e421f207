"""vLLM's environment and process, as the benchmark sees them through a pipe."""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Self

from core.errors import UserError
from experiments.config import ROOT
from inference_service.host_memory import LARGEST_REUSED_BYTES, MOST_KEPT_BYTES

HOME = ROOT / ".local" / "vllm"
REQUIREMENTS = ROOT / "benchmarks" / "vllm-requirements.txt"
LOG = HOME / "vllm.log"
KV_SPACE_GIB = 2


def vllm_python() -> Path:
    """Return the interpreter of vLLM's environment (6 GB); install it first if it is missing or out of date.

    Raises `UserError` if it cannot be installed.
    """
    HOME.mkdir(parents=True, exist_ok=True)
    python, stamp = HOME / "venv" / "bin" / "python", HOME / "venv.stamp"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    with (HOME / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if python.exists() and stamp.exists() and stamp.read_text() == wanted:
            return python
        uv = Path(sys.executable).parent / "uv"
        commands: list[list[str | Path]] = [
            [uv, "venv", "--quiet", "--clear", "--python", "python3.11", HOME / "venv"],
            [uv, "pip", "sync", "--quiet", "--python", python, "--require-hashes", REQUIREMENTS],
        ]
        for command in commands:
            if subprocess.run(command, cwd=ROOT, check=False).returncode:
                raise UserError("vLLM's environment could not be installed; see above")
        stamp.write_text(wanted)
    return python


class VllmProcess:
    """vLLM with its defaults (compiled) on some cores. Use it as a context manager."""

    def __init__(self, model: Path, max_len: int, rows: int, cores: Sequence[int]) -> None:
        """`rows` is the maximum number of sequences that decode together. One thread is bound to each of `cores`."""
        python = vllm_python()
        environment = os.environ | {
            # vLLM's guide to its CPU backend recommends Intel's OpenMP. Its threads soon sleep when they are idle.
            "LD_PRELOAD": str(python.parents[1] / "lib" / "libiomp5.so"),
            "KMP_BLOCKTIME": "1",
            # The guide also recommends an allocator that keeps freed memory. glibc does so with our engine's values.
            "MALLOC_MMAP_THRESHOLD_": str(LARGEST_REUSED_BYTES),
            "MALLOC_TRIM_THRESHOLD_": str(MOST_KEPT_BYTES),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": str(KV_SPACE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_CACHE_ROOT": str(HOME / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(HOME / "inductor"),
            "VLLM_LOGGING_STREAM": "ext://sys.stderr",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": str(len(cores)),
            "HF_HUB_OFFLINE": "1",
        }
        worker = Path(__file__).with_name("vllm_offline.py")
        command: list[str | Path] = [python, "-P", worker, model, str(max_len), str(rows), str(len(cores))]
        with LOG.open("a") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=HOME
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders: IO[str] = self._process.stdin
        self._said: IO[str] = self._process.stdout

    @property
    def pid(self) -> int:
        return self._process.pid

    def ready(self) -> dict[str, Any]:
        """Wait until it has loaded and compiled (minutes the first time); return its versions and threads."""
        facts: dict[str, Any] = self._hear()["ready"]
        return facts

    def answer(self, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, list[list[int]]]:
        """Answer all prompts together, greedily, with `tokens` tokens each; return seconds and answers."""
        self._orders.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
        self._orders.flush()
        done = self._hear()
        return done["took_s"], done["answers"]

    def _hear(self) -> dict[str, Any]:
        line = self._said.readline()
        if not line:
            raise UserError(f"vLLM has ended with status {self._process.wait()}; its output is in {LOG}")
        said: dict[str, Any] = json.loads(line)
        return said

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

"""Processes of the stack, identified by pid *and* start time, so that a reused pid is never taken for one of them."""

import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

from core.config import Config
from core.errors import UserError

# Linux gives start times in steps of 10 ms.
SAME_START_S = 0.05
KILL_WAIT_S = 10.0


class Started(Config):
    """One process of the stack. It leads its own session."""

    service: str
    name: str
    pid: int
    since_boot_s: float
    """Start time since the boot, which unlike the time of day cannot be changed."""
    log: str
    """Pattern of its log files, for `pathlib.Path.glob` below the log folder."""


def launch(
    service: str, name: str, argv: list[str], env: Mapping[str, str], logs: Path, *, log: str | None = None
) -> Started:
    """Start `argv` so that it outlives this process. It writes to `logs/NAME.out`. Raises `UserError` if it fails."""
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"{name}.out").open("wb") as out:
        try:
            child = subprocess.Popen(
                argv,
                env=dict(env),
                cwd=logs,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"{argv[0]}: {error.strerror}; run scripts/setup.sh") from None
    since_boot_s = _since_boot_s(psutil.Process(child.pid))
    return Started(service=service, name=name, pid=child.pid, since_boot_s=since_boot_s, log=log or f"{name}.out")


def is_alive(started: Started) -> bool:
    """True if this very process runs; another process with its pid, or a zombie, does not count."""
    try:
        process = psutil.Process(started.pid)
        return _is_same(process, started) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def members(started: Started) -> list[psutil.Process]:
    """Return the process and its descendants (a TaskManager's Python workers), even if the process is dead."""
    try:
        if not _is_same(psutil.Process(started.pid), started):
            return []
    except psutil.NoSuchProcess:
        # A pid is not reused while it names a session, so processes in this session descend from ours.
        pass
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == started.pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def end(all_started: Iterable[Started], grace_s: float) -> int:
    """End the processes and their descendants by SIGTERM, and by SIGKILL after `grace_s`. Return their number."""
    all_started = tuple(all_started)
    asked = [process for started in all_started for process in members(started)]
    for process in asked:
        _signal(process, kill=False)
    psutil.wait_procs(asked, timeout=grace_s)
    # Look again: a process may have started another one meanwhile.
    left = [process for started in all_started for process in members(started)]
    for process in left:
        _signal(process, kill=True)
    _, immortal = psutil.wait_procs(left, timeout=KILL_WAIT_S)
    if immortal:
        pids = ", ".join(str(process.pid) for process in immortal)
        raise UserError(f"processes {pids} do not end even when killed; see what they wait for with ps")
    return len(asked)


def _signal(process: psutil.Process, kill: bool) -> None:
    try:
        if kill:
            process.kill()
        else:
            process.terminate()
    except psutil.NoSuchProcess:
        pass


def _since_boot_s(process: psutil.Process) -> float:
    return process.create_time() - psutil.boot_time()


def _is_same(process: psutil.Process, started: Started) -> bool:
    return abs(_since_boot_s(process) - started.since_boot_s) < SAME_START_S

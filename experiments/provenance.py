"""Time, machine, versions and commit of a run, so that a reader can judge its numbers or repeat it."""

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from core.machine import usable_cores
from experiments.config import ROOT
from experiments.records import Provenance

PACKAGES = ("apache-flink", "torch", "transformers", "numpy", "kafka-python", "redis", "pydantic")


def provenance() -> Provenance:
    """Return commit, versions and machine of this process."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain")
    return Provenance(
        started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=_machine(),
        versions={"python": platform.python_version()} | _versions(),
        git_commit=commit,
        git_dirty=None if changes is None else bool(changes),
    )


def _machine() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

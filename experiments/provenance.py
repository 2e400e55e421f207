"""Where, when and with what a run was made: what a reader needs to judge its numbers, or to repeat them."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psutil

from core.config import JobConfig
from experiments.config import ROOT
from experiments.records import Provenance

PACKAGES = ("apache-flink", "torch", "transformers", "numpy", "kafka-python", "redis", "pydantic")


def provenance() -> Provenance:
    """Of this process, now."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain")
    return Provenance(
        started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=_machine(),
        versions={"python": platform.python_version()} | _versions(),
        git_commit=commit,
        git_dirty=None if changes is None else bool(changes),
    )


def without_secrets(job: JobConfig) -> JobConfig:
    """`job` as it may stand in a file: a user and password in Redis's address are left out."""
    url = job.cache.remote.redis_url
    if url is None or "@" not in url:
        return job
    parts = urlsplit(url)
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    remote = job.cache.remote.model_copy(update={"redis_url": bare})
    return job.model_copy(update={"cache": job.cache.model_copy(update={"remote": remote})})


def _machine() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
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

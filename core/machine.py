"""CPU cores and memory that this process may use: those of the machine, within the limits of the control groups.

In a container, `os.cpu_count()` and the free memory are those of the host. The container's limits are in files of the
control groups (cgroup v1 and v2) of the process, and of all groups above those.
"""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def usable_cores(root: Path = ROOT) -> int:
    """Number of cores that this process may run on, within the CPU quota of its control groups.

    A fraction of a core does not count, but the result is at least 1. Threads beyond the quota would only wait for each
    other.
    """
    quotas = [quota for group in _groups(root, "cpu") if (quota := _quota_cores(group)) is not None]
    return max(1, math.floor(min([len(os.sched_getaffinity(0)), *quotas])))


def free_memory_bytes(root: Path = ROOT) -> int:
    """Memory that this process can still allocate: the machine's available memory, within the limit of each group."""
    free = [room for group in _groups(root, "memory") if (room := _room_bytes(group)) is not None]
    machine = dict(line.split()[:2] for line in _lines(root / "proc/meminfo"))
    if (available_kib := _number(machine.get("MemAvailable:"))) is not None:
        free.append(1024 * available_kib)
    return max(0, min(free, default=sys.maxsize))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups that limit this process, innermost first. v1 has one tree per `controller`."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for mount, inner in _mounts(root, controllers):
            # In a container the mount may begin at the group of the container.
            relative = Path(path).relative_to(inner) if Path(path).is_relative_to(inner) else Path()
            folder = mount / relative
            yield folder
            yield from (above for above in folder.parents if above.is_relative_to(mount))


def _mounts(root: Path, controllers: str) -> Iterator[tuple[Path, str]]:
    """Mount point and root path of the v1 tree of `controllers`, or of the v2 tree if `controllers` is empty."""
    for line in _lines(root / "proc/self/mountinfo"):
        about, _, kind = line.partition(" - ")
        fields, (kind, _, options) = about.split(), kind.split(" ", 2)
        v2 = not controllers and kind == "cgroup2"
        v1 = controllers and kind == "cgroup" and set(controllers.split(",")) <= set(options.split(","))
        if v1 or v2:
            yield root / fields[4].lstrip("/"), fields[3]


def _quota_cores(group: Path) -> float | None:
    """Cores' worth of CPU time that a group may use; None without a limit."""
    words = (_text(group / "cpu.max") or "").split()
    if not words:
        words = [_text(group / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
    quota, period = (_number(word) for word in words[:2])
    return quota / period if quota and period else None


def _room_bytes(group: Path) -> int | None:
    """Bytes that a group may still allocate; None without a limit."""
    for limit_file, usage_file, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, usage = _number(_text(group / limit_file)), _number(_text(group / usage_file))
        if limit is not None and usage is not None:
            # Cached files count as used memory, but the kernel drops them when memory is needed.
            found = dict(line.split()[:2] for line in _lines(group / "memory.stat"))
            return limit - usage + (_number(found.get(cache)) or 0)
    return None


def _number(text: str | None) -> int | None:
    """`text` as a number; None for "max", for -1 and for no text."""
    return int(text) if text and text.isdigit() else None


def _text(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except OSError:
        return None


def _lines(file: Path) -> list[str]:
    return (_text(file) or "").splitlines()

"""CPU cores and memory that this process may use: what the machine has, within the limits of its control groups.

In a container `os.cpu_count()` and the machine's free memory are those of the host. The limits stand in files of the
control groups (cgroup v1 and v2) that the process is in, and of each group above those.
"""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def usable_cores(root: Path = ROOT) -> int:
    """Cores that this process may run on and has CPU time for: its affinity, within the quota of its groups.

    Part of a core does not count, but one is the least: threads beyond the quota would only wait for each other.
    """
    quotas = [quota for group in _groups(root, "cpu") if (quota := _quota_cores(group)) is not None]
    return max(1, math.floor(min([len(os.sched_getaffinity(0)), *quotas])))


def free_memory_bytes(root: Path = ROOT) -> int:
    """Memory that this process can still get: the machine's available memory, within the limit of each group."""
    free = [room for group in _groups(root, "memory") if (room := _room_bytes(group)) is not None]
    machine = dict(line.split()[:2] for line in _lines(root / "proc/meminfo"))
    if (available_kib := _number(machine.get("MemAvailable:"))) is not None:
        free.append(1024 * available_kib)
    return max(0, min(free, default=sys.maxsize))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the groups that limit this process by `controller` (v1) or in all (v2), innermost first."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for mount, inner in _mounts(root, controllers):
            # In a container the mount may show a group from inside: then it begins at that group.
            relative = Path(path).relative_to(inner) if Path(path).is_relative_to(inner) else Path()
            folder = mount / relative
            yield folder
            yield from (above for above in folder.parents if above.is_relative_to(mount))


def _mounts(root: Path, controllers: str) -> Iterator[tuple[Path, str]]:
    """Where the hierarchy of v1's `controllers`, or that of v2 where there are none, is mounted; its root's path."""
    for line in _lines(root / "proc/self/mountinfo"):
        about, _, kind = line.partition(" - ")
        fields, (kind, _, options) = about.split(), kind.split(" ", 2)
        v2 = not controllers and kind == "cgroup2"
        v1 = controllers and kind == "cgroup" and set(controllers.split(",")) <= set(options.split(","))
        if v1 or v2:
            yield root / fields[4].lstrip("/"), fields[3]


def _quota_cores(group: Path) -> float | None:
    """CPU time that a group may use, over time that passes; None without a limit."""
    words = (_text(group / "cpu.max") or "").split()
    if not words:
        words = [_text(group / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
    quota, period = (_number(word) for word in words[:2])
    return quota / period if quota and period else None


def _room_bytes(group: Path) -> int | None:
    """What a group may still allocate; None without a limit."""
    for limit_file, usage_file, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, usage = _number(_text(group / limit_file)), _number(_text(group / usage_file))
        if limit is not None and usage is not None:
            # Files that were read count as used, and are dropped as soon as memory is asked for.
            found = dict(line.split()[:2] for line in _lines(group / "memory.stat"))
            return limit - usage + (_number(found.get(cache)) or 0)
    return None


def _number(text: str | None) -> int | None:
    """A count; None for "max", for -1 and where there is nothing."""
    return int(text) if text and text.isdigit() else None


def _text(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except OSError:
        return None


def _lines(file: Path) -> list[str]:
    return (_text(file) or "").splitlines()

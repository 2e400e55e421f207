"""Limits of a process on its machine, from control groups of both versions."""

import os
from pathlib import Path

import pytest

from core.machine import free_memory_bytes, usable_cores
from inference_service.config import EngineConfig
from operators.config import JobConfig

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _large_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    made(tmp_path, {"proc/meminfo": f"MemTotal: {200 << 20} kB\nMemAvailable: {100 << 20} kB\nHugePages_Total: 0"})


def made(root: Path, files: dict[str, object]) -> Path:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{content}\n")
    return root


V2 = {
    "proc/self/cgroup": "0::/pod/worker",
    "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
}
V1 = {
    "proc/self/cgroup": "9:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc",
    # Inside a container the mount is the group of the process.
    "proc/self/mountinfo": "32 31 0:29 /docker/abc /sys/fs/cgroup/cpu,cpuacct ro master:9 - cgroup cgroup "
    "rw,cpu,cpuacct\n35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory",
}


def test_without_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    assert (usable_cores(tmp_path), free_memory_bytes(tmp_path)) == (64, 100 * GIB)


def test_affinity_limits_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7})
    assert usable_cores(tmp_path) == 3
    assert usable_cores(made(tmp_path, V2 | {"sys/fs/cgroup/pod/worker/cpu.max": "800000 100000"})) == 3


@pytest.mark.parametrize(
    ("quota", "cores"), [("400000 100000", 4), ("max 100000", 64), ("150000 100000", 1), ("20000 100000", 1)]
)
def test_a_quota_of_v2_limits_cores(tmp_path: Path, quota: str, cores: int) -> None:
    assert usable_cores(made(tmp_path, V2 | {"sys/fs/cgroup/pod/worker/cpu.max": quota})) == cores


def test_groups_above_limit_those_within(tmp_path: Path) -> None:
    root = made(
        tmp_path,
        V2
        | {
            "sys/fs/cgroup/pod/worker/cpu.max": "max 100000",
            "sys/fs/cgroup/pod/cpu.max": "250000 100000",
            "sys/fs/cgroup/pod/worker/memory.max": 8 * GIB,
            "sys/fs/cgroup/pod/worker/memory.current": GIB,
            "sys/fs/cgroup/pod/memory.max": 4 * GIB,
            "sys/fs/cgroup/pod/memory.current": 3 * GIB,
        },
    )
    assert (usable_cores(root), free_memory_bytes(root)) == (2, GIB)


@pytest.mark.parametrize(("quota", "cores"), [(300_000, 3), (-1, 64)])
def test_a_quota_of_v1_limits_cores(tmp_path: Path, quota: int, cores: int) -> None:
    group = "sys/fs/cgroup/cpu,cpuacct"
    root = made(tmp_path, V1 | {f"{group}/cpu.cfs_quota_us": quota, f"{group}/cpu.cfs_period_us": 100_000})
    assert usable_cores(root) == cores


def test_memory_in_use_is_not_free_but_for_files_that_were_read(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/pod/worker"
    limits = {f"{group}/memory.max": 8 * GIB, f"{group}/memory.current": 6 * GIB}
    root = made(tmp_path, V2 | limits | {f"{group}/memory.stat": f"anon {3 * GIB}\ninactive_file {2 * GIB}"})
    assert free_memory_bytes(root) == 4 * GIB
    assert free_memory_bytes(made(tmp_path, {f"{group}/memory.max": "max"})) == 100 * GIB
    assert free_memory_bytes(made(tmp_path, {f"{group}/memory.max": GIB})) == 0


def test_a_limit_of_v1_counts(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory"
    files = {
        f"{group}/memory.limit_in_bytes": 4 * GIB,
        f"{group}/memory.usage_in_bytes": 3 * GIB,
        f"{group}/memory.stat": f"total_inactive_file {GIB}",
    }
    root = made(tmp_path, V1 | files)
    assert free_memory_bytes(root) == 2 * GIB
    assert free_memory_bytes(made(root, {f"{group}/memory.limit_in_bytes": 1 << 62})) == 100 * GIB


def test_threads_of_a_slot_are_its_share_of_what_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("operators.config.usable_cores", lambda: 5)
    assert [JobConfig(parallelism=slots).threads_per_slot for slots in (1, 2, 8)] == [5, 2, 1]
    assert JobConfig(engine=EngineConfig(threads=7)).threads_per_slot == 7

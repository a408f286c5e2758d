"""How many CPUs this process may use: those of its affinity mask, within the CPU quota of its container."""

from __future__ import annotations

import os
from pathlib import Path

from moe.cgroups import cgroup_folders

ROOT = Path("/")


def usable_cores(root: Path = ROOT) -> int:
    """Physical cores, at least 1: threads for matrix products. The hardware threads of one core share its multipliers,
    so a second thread there only waits."""
    cpus = _cpus()
    return _within_quota(len({_siblings(cpu, root) for cpu in cpus}), root)


def usable_cpus(root: Path = ROOT) -> int:
    """CPUs as the kernel counts them, each hardware thread of a core as one, at least 1: processes for other work."""
    return _within_quota(len(_cpus()), root)


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPU time that this process's control groups may use in a second, in seconds; None without a limit."""
    quotas = [quota for version, folder in cgroup_folders("cpu", root) if (quota := _quota(version, folder))]
    return min(quotas, default=None)


def _cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _siblings(cpu: int, root: Path) -> str:
    """What the hardware threads of one core have in common; unknown, each is a core."""
    try:
        path = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return str(cpu)


def _within_quota(count: int, root: Path) -> int:
    """Rounded down: the kernel stops all threads of a group that has used its quota, those that wait included."""
    quota = cpu_quota(root)
    return max(1, count if quota is None else min(count, int(quota)))


def _quota(version: int, folder: Path) -> float | None:
    names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    try:
        quota, period = " ".join((folder / name).read_text(encoding="ascii") for name in names).split()
    except (OSError, ValueError):
        return None
    return int(quota) / int(period) if quota.isdigit() and int(period) else None  # "max" or -1: no limit

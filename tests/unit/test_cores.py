"""The CPUs that a process may use, by files like those of real kernels and containers, and on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe.cores import cpu_quota, usable_cores, usable_cpus

V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/cpu"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v1(folder: str, quota: int) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": "100000\n"}


CASES = {
    "no cgroups": ({}, None),
    "v2, no limit": ({"proc/self/cgroup": "0::/job\n", f"{V2}/job/cpu.max": "max 100000\n"}, None),
    "v2": ({"proc/self/cgroup": "0::/job\n", f"{V2}/job/cpu.max": "350000 100000\n"}, 3.5),
    "v2, the parent's is less": (
        {"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/b/cpu.max": "800000 100000\n", f"{V2}/a/cpu.max": "200000 100000\n"},
        2.0,
    ),
    "v2, the path is the host's": ({"proc/self/cgroup": "0::/docker/01\n", f"{V2}/cpu.max": "150000 100000\n"}, 1.5),
    "v2, torn": ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "\n"}, None),
    "v1": ({"proc/self/cgroup": "3:cpu,cpuacct:/job\n0::/\n"} | v1(f"{V1}/job", 400000), 4.0),
    "v1, no limit": ({"proc/self/cgroup": "3:cpu,cpuacct:/\n"} | v1(V1, -1), None),
    "another controller's": ({"proc/self/cgroup": "3:cpuset:/\n"} | v1(V1, 100000), None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_least_quota_counts(name: str, tmp_path: Path) -> None:
    files, quota = CASES[name]
    assert cpu_quota(tree(tmp_path, files)) == quota


@pytest.mark.parametrize(
    ("quota", "cpus", "cores"), [(None, 8, 4), ("600000", 6, 4), ("250000", 2, 2), ("50000", 1, 1), ("9900000", 8, 4)]
)
def test_hardware_threads_of_a_core_and_a_quota(
    quota: str | None, cpus: int, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor of four cores with two threads each, numbered as Linux does."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    files = {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu % 4},{cpu % 4 + 4}\n"
        for cpu in range(8)
    }
    if quota:
        files |= {"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": f"{quota} 100000\n"}
    root = tree(tmp_path, files)
    assert (usable_cpus(root), usable_cores(root)) == (cpus, cores)


def test_an_affinity_mask_and_an_unknown_topology(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 5, 6})
    assert (usable_cpus(tmp_path), usable_cores(tmp_path)) == (3, 3)


def test_this_machine() -> None:
    assert 1 <= usable_cores() <= usable_cpus() <= len(os.sched_getaffinity(0))

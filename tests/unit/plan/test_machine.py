"""The memory that is left, read from /proc and cgroup files like those of real kernels and containers."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from moe.plan.machine import host_memory

KB = 1024
MEMINFO = "MemTotal:       32000000 kB\nMemAvailable:   20000000 kB\nSwapTotal:      0 kB\nSwapFree:       {swap} kB\n"
V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"


def tree(root: Path, cgroup: str, files: dict[str, str], swap: int = 0) -> Path:
    for name, text in {"proc/meminfo": MEMINFO.format(swap=swap), "proc/self/cgroup": cgroup, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(folder: str, limit: str, used: int, files: int = 0) -> dict[str, str]:
    stat = f"anon 5\nactive_file {files}\ninactive_file 0\nslab_reclaimable 0\n"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": stat,
    }


def v1(folder: str, limit: int, used: int) -> dict[str, str]:
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": "cache 9\ntotal_active_file 300\ntotal_inactive_file 200\n",
    }


WHOLE = 20_000_000 * KB
CASES = {
    "no limit": ("0::/\n", {}, WHOLE),
    "no memory controller": ("2:cpu:/x\n1:name=systemd:/\n", v1(V1, 10, 1), WHOLE),
    "v2, unlimited": ("0::/job\n", v2(f"{V2}/job", "max", 5), WHOLE),
    "v2": ("0::/job\n", v2(f"{V2}/job", "1000000", 400000), 600000),
    "v2, files are given up": ("0::/job\n", v2(f"{V2}/job", "1000000", 400000, files=100000), 700000),
    "v2, the parent's is less": (
        "0::/a/b\n",
        v2(f"{V2}/a/b", "1000000", 0) | v2(f"{V2}/a", "900000", 600000),
        300000,
    ),
    "v2, already over": ("0::/job\n", v2(f"{V2}/job", "1000", 4000), 0),
    "v2, the path is the host's": ("0::/docker/0123\n", v2(V2, "5000", 1000), 4000),
    "v1": ("4:memory:/job\n0::/\n", v1(f"{V1}/job", 1000000, 400000), 600500),
    "v1, unlimited": ("4:memory:/job\n", v1(f"{V1}/job", 9223372036854771712, 400000), WHOLE),
    "v1, with another controller": ("4:cpu,memory:/\n", v1(V1, 2000, 600), 1900),
}


@pytest.mark.parametrize("name", CASES)
def test_the_least_of_machine_and_cgroups_is_left(name: str, tmp_path: Path) -> None:
    cgroup, files, left = CASES[name]
    root = tree(tmp_path, cgroup, files)
    assert host_memory(root=root) == left
    assert host_memory(4, root=root) == left // 4


def test_swap_counts(tmp_path: Path) -> None:
    assert host_memory(root=tree(tmp_path, "0::/\n", {}, swap=7)) == WHOLE + 7 * KB


def test_this_machine_is_read() -> None:
    assert 10**8 < host_memory() < 10**14


def test_ulimit_v_is_a_limit_of_each_process() -> None:
    limit = 3 * 10**9
    done = subprocess.run(
        [sys.executable, "-c", "from moe.plan.machine import host_memory; print(host_memory(), host_memory(2))"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    alone, each_of_two = map(int, done.stdout.split())
    assert 0 < alone < limit
    assert each_of_two <= alone

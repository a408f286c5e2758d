"""The memory that this machine has left for a process: what /proc reports, limited by cgroups and `ulimit -v`.

That is free memory, memory that the kernel can reclaim (clean file pages), and swap, since a process that swaps isn't
killed.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe.cgroups import cgroup_folders

ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class _Controller:
    """Names of a cgroup version's memory files, and the entries of memory.stat that the kernel can reclaim."""

    limit: str
    used: str
    given_up: tuple[str, ...]


_V1 = _Controller(
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)
_V2 = _Controller("memory.max", "memory.current", ("active_file", "inactive_file", "slab_reclaimable"))


def host_memory(ranks: int = 1, root: Path = ROOT) -> int:
    """Bytes of host memory for each of `ranks` processes that share this machine. Linux."""
    machine = _fields(root / "proc/meminfo")
    swap = 1024 * machine.get("SwapFree", 0)
    shared = min([1024 * machine["MemAvailable"], *_cgroups(root)]) + swap
    own = _address_space(root)
    return max(0, shared // ranks if own is None else min(shared // ranks, own))


def _cgroups(root: Path) -> Iterator[int]:
    """Bytes left in each cgroup with a limit that contains this process, parent cgroups included."""
    for version, folder in cgroup_folders("memory", root):
        names = _V1 if version == 1 else _V2
        limit, used = _number(folder / names.limit), _number(folder / names.used)
        if limit is not None and used is not None:
            given_up = _fields(folder / "memory.stat")
            yield max(0, limit - used + sum(given_up.get(name, 0) for name in names.given_up))


def _address_space(root: Path) -> int | None:
    """Bytes that `ulimit -v` leaves to this process; None without such a limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    pages = int((root / "proc/self/statm").read_text(encoding="ascii").split()[0])
    return limit - pages * resource.getpagesize()


def _number(path: Path) -> int | None:
    """The number in a file; None if there is no such file, or if it says `max`."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _fields(path: Path) -> dict[str, int]:
    """{name: number} of a file of lines `name number` or `name: number kB`."""
    rows = (line.replace(":", " ").split() for line in path.read_text(encoding="ascii").splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}

"""The memory that this machine has left for a process: what /proc reports, limited by cgroups and `ulimit -v`.

That is free memory, memory that the kernel can reclaim (clean file pages), and swap, since a process that swaps isn't
killed.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class _Controller:
    """Names of a cgroup version's memory files, and the entries of memory.stat that the kernel can reclaim."""

    folder: str
    limit: str
    used: str
    given_up: tuple[str, ...]


_V1 = _Controller(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)
_V2 = _Controller("sys/fs/cgroup", "memory.max", "memory.current", ("active_file", "inactive_file", "slab_reclaimable"))


def host_memory(ranks: int = 1, root: Path = ROOT) -> int:
    """Bytes of host memory for each of `ranks` processes that share this machine. Linux."""
    machine = _fields(root / "proc/meminfo")
    swap = 1024 * machine.get("SwapFree", 0)
    shared = min([1024 * machine["MemAvailable"], *_cgroups(root)]) + swap
    own = _address_space(root)
    return max(0, shared // ranks if own is None else min(shared // ranks, own))


def _cgroups(root: Path) -> Iterator[int]:
    """Bytes left in each cgroup with a limit that contains this process, parent cgroups included."""
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        names = _V1 if controllers else _V2
        # In a container the path may be the host's; then only the controller's top folder exists.
        top = root / names.folder
        folder = top / path.lstrip("/")
        for one in (folder, *folder.parents):
            if not one.is_relative_to(top):
                break
            limit, used = _number(one / names.limit), _number(one / names.used)
            if limit is not None and used is not None:
                given_up = _fields(one / "memory.stat")
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

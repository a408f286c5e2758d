"""The Linux control groups that this process is in, where its container or service manager sets limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def cgroup_folders(controller: str, root: Path = Path("/")) -> Iterator[tuple[int, Path]]:
    """(version, folder) of each group of a controller, as "memory" or "cpu", that contains this process, the innermost
    first; of both versions where both are mounted. Nothing where the kernel has no control groups.

    In a container the group's path may be the host's; then only the controller's top folder exists.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        version, top = (1, root / "sys/fs/cgroup" / controller) if controllers else (2, root / "sys/fs/cgroup")
        folder = top / path.lstrip("/")
        for one in (folder, *folder.parents):
            if not one.is_relative_to(top):
                break
            yield version, one

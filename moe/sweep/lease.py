"""Who trains a trial: a file that its worker keeps locked, so that the kernel frees it when the worker dies."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import IO

from moe.sweep.storage import GRACE_SECONDS

LEASE = ".lease"


class Lease:
    """Held until `close` or the end of the process."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def renew(self) -> None:
        """Tells other machines, whose file system may not share locks, that this one is alive."""
        os.utime(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def take_lease(run_dir: Path, *, lost: bool | None) -> Lease | None:
    """The lease of a trial that nobody trains; None while somebody does.

    The lock decides among processes of one machine. Of a holder on another machine `lost` says whether its heartbeat
    has stopped; where the storage has no heartbeat (None) the lease's age does.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / LEASE
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    file.seek(0)
    holder = _host(file.read())
    if holder not in (None, _this_host()) and not (_is_old(path) if lost is None else lost):
        file.close()
        return None
    file.truncate(0)
    file.write(json.dumps({"host": _this_host(), "process": os.getpid(), "since": time.time()}))
    file.flush()
    return Lease(file)


def _host(text: str) -> str | None:
    """The holder's machine; None where no whole lease was written."""
    try:
        return json.loads(text)["host"]
    except (ValueError, KeyError, TypeError):
        return None


def _this_host() -> str:
    return os.uname().nodename


def _is_old(path: Path) -> bool:
    """By the file system's clock, which all machines share."""
    probe = path.with_name(f"{LEASE}.{os.getpid()}.{_this_host()}")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime > GRACE_SECONDS
    finally:
        probe.unlink()

"""Locks that the kernel drops when their process dies."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from moe.errors import UserError


class RunLock:
    """Holds a run directory: one job at a time, or with `shared` any number of jobs that all say so.

    Raises UserError if another job holds it, or `.lock` is no file.
    """

    def __init__(self, run_dir: Path, *, shared: bool = False) -> None:
        self._run_dir, self._path = run_dir, run_dir / ".lock"
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise UserError(f"run_dir={run_dir}: can't be made ({error.strerror}): name another folder") from error
        while True:
            self._file = self._open()
            try:
                fcntl.flock(self._file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = _read_soon(self._file)
                self._file.close()
                raise UserError(
                    f"run_dir={run_dir} is in use by {holder}: wait for it, stop it, or choose another run_dir"
                ) from error
            if self._is_in_place():
                break
            self._file.close()  # another file took its place before it was locked
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        self._file.flush()

    def _open(self) -> IO[str]:
        # A link's target must not be written, and a FIFO's other end not waited for.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(self._path, flags, 0o644)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise
            raise UserError(f"{self._path}: must be a plain file, not a link or directory: remove it") from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise UserError(f"{self._path}: must be a plain file: remove it")
        return open(descriptor, "a+", encoding="utf-8")

    def _is_in_place(self) -> bool:
        try:
            found = self._path.lstat()
        except OSError:
            return False
        mine = os.fstat(self._file.fileno())
        return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)

    def check(self, step: int) -> None:
        """Raises OSError when the directory was removed, renamed or replaced since it was locked."""
        if not self._is_in_place():
            raise OSError(
                f"step {step}: run_dir={self._run_dir} was removed, renamed or replaced while this run wrote it: "
                "nothing more is written there; bring the directory back and run the same command to go on from its "
                "newest checkpoint"
            )

    def close(self) -> None:
        self._file.close()


def _read_soon(file: IO[str]) -> str:
    """The line that names the holder, who writes it a moment after locking."""
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        file.seek(0)
        if text := file.read().strip():
            return text
        time.sleep(0.01)
    return "an unknown process"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until no other process is in a block with the same `path`, a file that is made if it isn't there."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

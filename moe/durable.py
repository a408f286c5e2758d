"""Files that a power cut leaves old or new, never torn."""

from __future__ import annotations

import errno
import os
from pathlib import Path

PARTIAL = ".partial"


def fsync(path: Path) -> None:
    """A file's content, or a folder's list of names, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: str | bytes) -> None:
    """Replace `path` so that a reader sees the old or the new content, never part of one, even after a power cut."""
    beside = path.with_name(path.name + PARTIAL)
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        fsync(beside)
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def append_line(path: Path, line: str) -> None:
    """A whole line or none: a torn one is cut off again before the error passes through."""
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            if file.write(line.encode()) < len(line.encode()):
                raise OSError(errno.ENOSPC, "no space for the whole line")
        except OSError as error:
            file.truncate(end)
            raise OSError(error.errno, error.strerror, str(path)) from error

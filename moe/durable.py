"""Files that a power cut leaves old or new, never torn."""

from __future__ import annotations

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


def write_durably(path: Path, text: str) -> None:
    """Replace `path` so that a reader sees the old or the new text, never part of one, even after a power cut."""
    beside = path.with_name(path.name + PARTIAL)
    beside.write_text(text, encoding="utf-8")
    fsync(beside)
    beside.replace(path)
    fsync(path.parent)

"""A folder that is whole or isn't there: written beside, flushed to disk, renamed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe.durable import PARTIAL, fsync
from moe.errors import UserError


@contextmanager
def new_folder(folder: Path, key: str) -> Iterator[Path]:
    """Yields a folder to write into, which becomes `folder` when the block ends, and is removed when it fails.

    Raises UserError naming the configuration's `key` where `folder` exists, OSError.
    """
    if folder.is_symlink() or folder.exists():
        raise UserError(f"{key}={folder} exists: name a new folder, or remove this one")
    partial = folder.with_name(folder.name + PARTIAL)
    if partial.is_symlink() or partial.is_file():
        partial.unlink()
    elif partial.exists():  # what an interrupted command left
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.rglob("*"), partial):
            if path.is_dir():
                fsync(path)
        partial.rename(folder)
        fsync(folder.parent)
    except BaseException:  # also an interrupt: nothing half-done stays
        shutil.rmtree(partial, ignore_errors=True)
        raise

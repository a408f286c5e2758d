"""Writes that survive a power cut: a file is then old or new, never half of each; a new folder is whole or absent."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moe.errors import UserError
from moe.untrusted import open_regular

PARTIAL = ".partial"
UNFINISHED = ".moe-unfinished"  # a file in the folders that `new_folder` is writing


def fsync(path: Path) -> None:
    """Flushes a file's content, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: str | bytes) -> None:
    """Replaces `path`; a reader sees the whole old or the whole new content, even after a power cut. Raises OSError."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.unlink(missing_ok=True)  # a FIFO there would be waited for, and a link's target overwritten
        with partial.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        fsync(partial)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_section(page: Path, begin: str, end: str, lines: Iterable[str]) -> None:
    """Replaces the lines of `page` between the markers `begin` and `end`. Raises UserError unless it has each once."""
    before, rest = check_section(page, begin, end).split(begin)
    write_durably(page, before + "\n".join([begin, *lines, end]) + rest.split(end)[1])


def check_section(page: Path, begin: str, end: str) -> str:
    """The text of `page`. Raises UserError unless it has the markers `begin` and `end`, each once and in this order."""
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{page} can't be read ({error}): a page with the lines {begin} and {end} is needed") from error
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"{page} must have the lines {begin} and {end}, each once: the section goes between them")
    return text


def append_line(path: Path, line: str) -> None:
    """Appends a whole line or nothing: after an error the part that was written is removed. Raises OSError."""
    try:
        file = open_regular(path, "ab")
    except UserError as error:  # a FIFO that took its place
        raise OSError(errno.EINVAL, "no regular file", str(path)) from error
    with file:
        end = file.seek(0, os.SEEK_END)
        try:
            if file.write(line.encode()) < len(line.encode()):
                raise OSError(errno.ENOSPC, "no space for the whole line")
        except OSError as error:
            file.truncate(end)
            raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def new_folder(folder: Path, key: str) -> Iterator[Path]:
    """Yields a folder to write into, which becomes `folder` when the block ends, and is removed when it fails.

    Raises UserError naming the configuration's `key` where `folder` exists, or a folder that no interrupted command
    left is in the way; OSError.
    """
    if folder.is_symlink() or folder.exists():
        raise UserError(f"{key}={folder} exists: name a new folder, or remove this one")
    partial = folder.with_name(folder.name + PARTIAL)
    if partial.is_symlink() or partial.is_file():
        partial.unlink()
    elif partial.exists():  # what an interrupted command left, or a folder of the user's
        if any(partial.iterdir()) and not (partial / UNFINISHED).exists():
            raise UserError(
                f"{key}={folder}: {partial} is in the way: remove it if an interrupted command left it, or rename it"
            )
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
        (partial / UNFINISHED).touch()
        yield partial
        for path in partial.rglob("*"):
            if path.is_dir():
                fsync(path)
        (partial / UNFINISHED).unlink()
        fsync(partial)
        partial.rename(folder)
        fsync(folder.parent)
    except BaseException:  # also an interrupt: nothing half-done stays
        shutil.rmtree(partial, ignore_errors=True)
        raise

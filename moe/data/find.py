"""The files that a path, folder or glob names, and what of them is left out.

Links are followed, but each folder is entered once and each file read once, whatever links lead to it.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from moe.config import SourceFormat
from moe.data.formats import refusal, short_name, special
from moe.data.readers import DataError
from moe.errors import shown

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
KINDS_SHOWN = 6


@dataclass(slots=True)
class Found:
    """`files` in a fixed order; `left` counts what isn't read by kind. `several`: a folder or glob was given."""

    files: list[Path] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)
    several: bool = False

    def left_out(self) -> str:
        """`; left out 4: 3 .pdf, 1 hidden`; empty where nothing was left out."""
        kinds = [f"{count} {kind}" for kind, count in self.left.most_common(KINDS_SHOWN)]
        if not kinds:
            return ""
        more = len(self.left) - len(kinds)
        return f"; left out {self.left.total()}: {', '.join(kinds)}{f' and {more} kinds more' if more else ''}"


def expanded(key: str, text: str) -> Path:
    """`text` as a path, with `~`. Raises DataError naming `key`."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise DataError(f"{key}={shown(text)}: no such user's home folder: write the path in full") from error


def find(key: str, text: str, stated: SourceFormat) -> Found:
    """What `{key}.path=text` names. A file that can't be used is an error where it is named, and left out of a folder
    or glob that has others. Raises DataError."""
    path, named = expanded(f"{key}.path", text), f"{key}.path={shown(text, 200)}"
    try:
        if path.is_file():
            if reason := refusal(stated, path, key):
                raise DataError(f"{path}: {reason}")
            return Found([path])
        if path.is_dir():
            found = _select(key, stated, _expand((*path.parts, "**", "*"), hidden=True))
            empty = "the folder holds no files"
        elif path.exists():
            raise DataError(f"{named}: is {special(path)}: give a file, folder or glob")
        elif glob.has_magic(text):
            found = _select(key, stated, _expand(path.parts, hidden=False))
            empty = f"the glob matches no file (working folder: {Path.cwd()})"
        else:
            # A mistyped folder must fail at once, not after a search of the Hub, so Hub names need format=dataset.
            hint = f"; a data set on the Hub needs {key}.format=dataset" if HUB_NAME.fullmatch(text) else ""
            raise DataError(f"{named}: no such file or folder (working folder: {Path.cwd()}){hint}")
    except OSError as error:
        raise DataError(f"{error.filename or named}: {error.strerror}") from error
    if not found.files:
        raise DataError(f"{named}: {empty}{found.left_out()}")
    return found


def _select(key: str, stated: SourceFormat, names: Iterator[tuple[str, Path]]) -> Found:
    """The files among `names` that are read, sorted; the others are counted. Raises DataError where all are refused."""
    found, real, reason = Found(several=True), set[str](), ""
    files = []
    for kind, path in names:
        if kind:
            found.left[kind] += 1
        else:
            files.append(path)
    for path in sorted(files):
        if refused := refusal(stated, path, key):
            found.left[short_name(path)] += 1
            reason = reason or f"{path}: {refused}"
        elif (place := os.path.realpath(path)) in real:
            found.left["link to a file that is read"] += 1
        else:
            real.add(place)
            found.files.append(path)
    if reason and not found.files:
        raise DataError(reason)
    return found


def _expand(parts: tuple[str, ...], *, hidden: bool) -> Iterator[tuple[str, Path]]:
    """("", file) of each file that the pattern's `parts` match, and (kind, path) of what is no file to read.

    `**` stands for any number of folders; wildcards match no hidden names, which are counted only with `hidden`.
    """
    if parts[-1] == "**":
        parts += ("*",)
    recursive = "**" in parts
    absolute = os.path.isabs(parts[0])
    waiting = [(Path(parts[0]) if absolute else Path(), int(absolute))]
    seen = set[tuple[int, int, int]]()
    while waiting:
        folder, at = waiting.pop()
        about = folder.stat()
        state = (about.st_dev, about.st_ino, at)
        if state in seen:
            continue
        seen.add(state)
        part, last = parts[at], at == len(parts) - 1
        if not glob.has_magic(part):
            path = folder / part
            if last and path.exists():
                yield _kind(path), path
            elif not last and path.is_dir():
                waiting.append((path, at + 1))
            continue
        deeper = []
        for entry in sorted(os.scandir(folder), key=lambda entry: (entry.is_symlink(), entry.name)):
            path = folder / entry.name
            is_folder = path.is_dir() if entry.is_symlink() else entry.is_dir()
            if entry.name.startswith(".") and not part.startswith("."):
                if hidden and part != "**":
                    yield "hidden", path
            elif part == "**":
                deeper += [(path, at)] if is_folder else []
            elif fnmatchcase(entry.name, part):
                if not last:
                    deeper += [(path, at + 1)] if is_folder else []
                elif not is_folder:
                    yield _kind(path), path
                elif not recursive:
                    yield "folder", path
        waiting += reversed(deeper)
        if part == "**":
            waiting.append((folder, at + 1))


def _kind(path: Path) -> str:
    """Empty for a file; else what it is."""
    if path.is_file():
        return ""
    if not path.exists():
        return "broken link"
    return "folder" if path.is_dir() else "FIFO, socket or device"

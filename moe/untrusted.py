"""Reads files that somebody else may have written: a run directory from the network, a bad disk, a killed program.

Only regular files are opened: a FIFO would be waited for, and /dev/zero has no end. Small files have a largest size, a
line of a long one too. Values are checked by type and range where they are taken. Every failure is a UserError of one
line: file, key, value, rule.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from moe.errors import UserError

SMALL_FILE = 16 << 20  # bytes of a JSON file; a manifest of 10,000 shards takes 1.5 MB
LONGEST_LINE = 16 << 20  # bytes of a JSONL file's line; 100 layers' shares of 500 experts take 1 MB
MAX_COUNT = 10**15  # steps, tokens, samples: exact as a float, and products of two fit Python's integers on the page
MAX_REAL = 1e300
SHOWN = 40  # characters of a value in a message


def open_regular(path: Path, mode: str = "rb") -> BufferedReader:
    """The file at `path`, opened to read ("rb") or append ("ab"). Raises UserError where it is anything but a regular
    file, OSError where it is missing. A link is read, but not written: its target may be outside the run directory."""
    flags = os.O_RDONLY if mode == "rb" else os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)  # NONBLOCK: a FIFO isn't waited for
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return open(descriptor, mode, buffering=0 if mode == "ab" else -1)  # pyright: ignore[reportReturnType]
        os.close(descriptor)
    except OSError as error:
        if error.errno != errno.ELOOP and (not path.exists() or path.is_file()):
            raise
    raise UserError(f"{path}: must be a regular file, not {_kind(path)}: remove it")


def _kind(path: Path) -> str:
    kinds = {
        "a folder": path.is_dir, "a FIFO": path.is_fifo, "a socket": path.is_socket,
        "a device": lambda: path.is_char_device() or path.is_block_device(),
    }  # fmt: skip
    return next((name for name, holds in kinds.items() if holds()), "a link")


def read_small(path: Path, limit: int = SMALL_FILE) -> bytes:
    """A regular file's content. Raises UserError, also where it has more than `limit` bytes, and OSError."""
    with open_regular(path) as file:
        data = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)  # as much memory as is asked for is taken
    if len(data) > limit:
        size = path.stat().st_size
        raise UserError(f"{path}: has {size:,} bytes, and at most {limit:,} are read: it is not what its name says")
    return data


def read_text(path: Path, limit: int = SMALL_FILE) -> str:
    """As `read_small`, of UTF-8."""
    try:
        return read_small(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} isn't UTF-8") from error


def read_json(path: Path, limit: int = SMALL_FILE) -> Any:
    """Raises UserError for what is no JSON (NaN and infinities aren't), OSError."""
    text = read_text(path, limit)
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def read_object(path: Path, fix: str, limit: int = SMALL_FILE) -> Values:
    """A JSON file that holds an object. Raises UserError, OSError."""
    return Values.of(read_json(path, limit), str(path), fix)


@dataclass(frozen=True, slots=True)
class Values:
    """A JSON object of the file (or line) `where`: each value is checked when it is taken. `fix` ends the messages."""

    values: dict[str, Any]
    where: str
    fix: str
    prefix: str = ""

    @classmethod
    def of(cls, value: Any, where: str, fix: str) -> Values:
        if not isinstance(value, dict):
            raise UserError(f"{where}: must be a JSON object, not {shown(value)}; {fix}")
        return cls(value, where, fix)

    def take(self, key: str, holds: Callable[[Any], bool], rule: str) -> Any:
        """Raises UserError where the value is missing or doesn't hold."""
        if key not in self.values:
            raise UserError(f"{self.where}: {self.prefix}{key} is missing: it must be {rule}; {self.fix}")
        value = self.values[key]
        if not holds(value):
            raise UserError(f"{self.where}: {self.prefix}{key}={shown(value)} must be {rule}; {self.fix}")
        return value

    def count(self, key: str, at_least: int = 0, at_most: int = MAX_COUNT) -> int:
        def holds(value: Any) -> bool:
            return is_count(value, at_most) and value >= at_least

        return self.take(key, holds, f"a whole number from {at_least} to {at_most}")

    def text(self, key: str, pattern: str = r".*") -> str:
        holds = re.compile(pattern, re.DOTALL).fullmatch
        rule = "text" if pattern == r".*" else f"text of the form {pattern}"
        return self.take(key, lambda value: isinstance(value, str) and bool(holds(value)), rule)

    def object(self, key: str) -> Values:
        inner = self.take(key, lambda value: isinstance(value, dict), "an object")
        return Values(inner, self.where, self.fix, f"{self.prefix}{key}.")


def shown(value: Any) -> str:
    """A value in a message: its beginning."""
    try:
        text = str(value) if type(value) in (int, float) and abs(value) < 10**SHOWN else json.dumps(value, default=str)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def is_count(value: Any, at_most: int = MAX_COUNT) -> bool:
    """A whole number from 0 to `at_most`; true and false are none."""
    return type(value) is int and 0 <= value <= at_most


def is_real(value: Any) -> bool:
    """A finite number; true and false are none."""
    return type(value) in (int, float) and abs(value) <= MAX_REAL


def is_gap(value: Any) -> bool:
    """What stands where a number was not finite: null, or NaN and infinities, which JSON doesn't have."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a JSONL file: its number from 1, the byte where it starts, its bytes, and the object that it is; None
    where it is none, as a killed program leaves one."""

    number: int
    offset: int
    raw: bytes
    value: dict[str, Any] | None


def json_lines(path: Path) -> Iterator[Line]:
    """The lines that aren't blank. Raises UserError where one has more than `LONGEST_LINE` bytes, OSError."""
    number = offset = 0
    with open_regular(path) as file:
        while raw := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(raw) > LONGEST_LINE:
                raise UserError(f"{path}:{number}: the line has more than {LONGEST_LINE:,} bytes: remove it")
            if raw.strip():
                yield Line(number, offset, raw, _object(raw))
            offset += len(raw)


def _object(raw: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None

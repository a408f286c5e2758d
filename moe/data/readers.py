"""Reads one file or table as documents; every error is one line with the file and the place in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.errors import UserError


class DataError(UserError):
    """Data that can't be used. Its text is one line: file, place, rule, fix."""


@dataclass(slots=True)
class Chunk:
    """Part of a document, or all of it. A chunk that doesn't start a document continues the one before it."""

    data: bytes  # valid UTF-8
    starts_document: bool = True

    @property
    def text(self) -> str:
        return self.data.decode()


def read_text(path: Path, chunk_bytes: int) -> Iterator[Chunk]:
    """One document per file, in chunks of about `chunk_bytes` that end with a line (or, in a long one, a character)."""
    starts_document, position = True, 0
    try:
        with path.open("rb") as file:
            tail = b""
            while block := file.read(chunk_bytes):
                block = tail + block + file.readline(chunk_bytes)
                # A line longer than a chunk is cut at any byte; the bytes of a cut character go into the next chunk.
                tail = _unfinished(block) if not block.endswith(b"\n") else b""
                block = block[: len(block) - len(tail)]
                _decode(block, path, position)
                yield Chunk(block, starts_document)
                starts_document, position = False, position + len(block)
            if tail:
                _decode(tail, path, position)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def _unfinished(block: bytes) -> bytes:
    """The 0 to 3 bytes at the end of `block` that begin a UTF-8 character without ending it."""
    for length in range(1, min(3, len(block)) + 1):
        lead = block[-length]
        if lead >= 0xC0:
            need = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return block[-length:] if need > length else b""
        if lead < 0x80:
            break
    return b""


def _decode(block: bytes, path: Path, position: int) -> str:
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        place = position + error.start
        raise DataError(f"{path}: byte {place} (0x{block[error.start]:02x}) is not UTF-8: {error.reason}") from error


def read_jsonl(path: Path, key: str, field: str) -> Iterator[Chunk]:
    """One document per line: its string `field`. Blank lines are skipped; `key` is the source's, for messages."""
    position = number = 0
    try:
        with path.open("rb") as file:
            while line := file.readline():
                number += 1
                text = _decode(line.rstrip(b"\r\n"), path, position)
                position += len(line)
                line = b""  # a row may have many megabytes, so no copy of it is kept longer than needed
                if not text or text.isspace():
                    continue
                try:
                    row = json.loads(text.removeprefix("\ufeff"))
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}:{number}: broken JSON at column {error.colno}: {error.msg}") from error
                except RecursionError as error:
                    raise DataError(f"{path}:{number}: broken JSON: nested too deeply") from error
                if not isinstance(row, dict):
                    raise DataError(f"{path}:{number}: must be a JSON object, is a {type(row).__name__}")
                if field not in row:
                    raise DataError(f"{path}:{number}: {no_field(key, field, list(row))}")
                value, row, text = row[field], None, ""
                chunk, value = as_chunk(value, field, f"{path}:{number}"), None
                yield chunk
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def no_field(key: str, field: str, names: list[str]) -> str:
    """The message for a row or table without `field`."""
    return f"no field {field!r}; it has {', '.join(map(str, names)) or 'none'}: set {key}.text_field"


def as_chunk(value: Any, field: str, place: str) -> Chunk:
    """A row's value as a document. Raises DataError, naming the place, when it isn't text."""
    if not isinstance(value, str):
        shown = "null" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{place}: field {field!r} must be a string, is {shown}")
    try:
        return Chunk(value.encode("utf-8"))
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        wrong = f"U+{ord(value[error.start]):04X}"
        raise DataError(f"{place}: field {field!r} holds a lone surrogate ({wrong}), which is not text") from error


def read_parquet(path: Path, key: str, field: str) -> Iterator[Chunk]:
    """One document per row: its string column `field`; `key` is the source's, for messages."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise DataError(f"{path}: {no_field(key, field, names)}")
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield as_chunk(value, field, f"{path}: row {number}")
                    number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not readable as Parquet: {first_line(error)}") from error


def column(rows: Iterable[Any], field: str, place: str) -> Iterator[Any]:
    """`field` of every row of a `datasets` table."""
    try:
        for row in rows:
            yield row[field]
    except Exception as error:  # `datasets` lets any exception of its readers through
        raise DataError(f"{place}: `datasets` can't read it: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

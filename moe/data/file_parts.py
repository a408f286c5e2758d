"""Cuts files into parts that any process can read: text files where their chunks begin, JSONL between lines, Parquet
between row groups.

Uncompressed files are read once to find these places, and the parts hold paths and places, not text.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from moe.data.parts import PART_BYTES, Part, Table, given_chunks, given_rows
from moe.data.readers import COMPRESSED_SUFFIXES, Chunk, DataError, blocks_of, opened, text_chunk
from moe.data.rows import column_chunks, group_batches, jsonl_chunks, no_field, only_once, open_parquet
from moe.data.tables import TableRow, json_rows, parquet_rows

LARGEST_GROUP = 1 << 26  # bytes: a larger row group of a Parquet file isn't left to one process
LINE_BYTES = 1 << 20  # of a line's end read at once


@dataclass(frozen=True, slots=True)
class TextSpan:
    """Bytes `start` to `stop` of a text file, one chunk; `data`, if this process can't read them itself."""

    path: Path
    start: int
    stop: int
    data: bytes | None = None

    @property
    def size(self) -> int:
        return self.stop - self.start

    def chunks(self) -> Iterator[Chunk]:
        block = self.data
        if block is None:
            with _opened_at(self.path, self.start) as file:
                block = file.read(self.size)
        yield text_chunk(block, self.path, self.start)


def text_parts(path: Path, chunk_bytes: int) -> Iterator[TextSpan]:
    """One document, in chunks of about `chunk_bytes` that end with a line (or, in a long one, a character)."""
    compressed, position = _is_compressed(path), 0
    with opened(path) as file:
        for block in blocks_of(file, chunk_bytes):
            yield TextSpan(path, position, position + len(block), block if compressed else None)
            position += len(block)


@dataclass(frozen=True, slots=True)
class LineSpan:
    """Bytes `start` to `stop` of a file, whole lines from number `line` on; `data`, if another process can't read them
    itself."""

    path: Path
    start: int
    stop: int
    line: int
    data: bytes | None = None

    @property
    def size(self) -> int:
        return self.stop - self.start

    def lines(self) -> Iterator[tuple[int, int, bytes]]:
        """(number, position in the file, line) of each."""
        number, position = self.line, self.start
        with self._opened() as file:
            while position < self.stop and (held := [file.readline(self.stop - position)])[0]:
                size = len(held[0])
                yield number, position, held.pop()  # a row may have many megabytes: no copy is kept
                number, position = number + 1, position + size

    def rows(self) -> Iterator[TableRow]:
        return json_rows(self.lines(), self.path)

    def _opened(self) -> AbstractContextManager[BinaryIO]:
        if self.data is not None:
            return nullcontext(io.BytesIO(self.data))
        return _opened_at(self.path, self.start)


@contextmanager
def _opened_at(path: Path, start: int) -> Iterator[BinaryIO]:
    with opened(path) as file:
        file.seek(start)
        yield file


def line_parts(path: Path) -> Iterator[LineSpan]:
    """A file's lines in spans of about PART_BYTES, longer where a line is."""
    compressed, start, line = _is_compressed(path), 0, 1
    with opened(path) as file:
        while block := file.read(PART_BYTES):
            kept, size, ends = [block], len(block), block.count(b"\n")
            while not block.endswith(b"\n") and (block := file.readline(LINE_BYTES)):
                size, ends = size + len(block), ends + block.endswith(b"\n")
                if compressed:
                    kept.append(block)
            yield LineSpan(path, start, start + size, line, b"".join(kept) if compressed else None)
            start, line = start + size, line + ends


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSED_SUFFIXES


@dataclass(frozen=True, slots=True)
class JsonDocuments:
    """Documents of JSONL: the string `field` of each line. `key` is the source's, for messages."""

    lines: LineSpan
    key: str
    field: str

    @property
    def size(self) -> int:
        return self.lines.size

    def chunks(self) -> Iterator[Chunk]:
        return jsonl_chunks(self.lines.lines(), self.lines.path, self.key, self.field)


@dataclass(frozen=True, slots=True)
class RowGroups:
    """Row groups of a Parquet file; `first` is the number of their first row. `field` is the column of documents."""

    path: Path
    groups: list[int]
    first: int
    size: int
    field: str | None = None

    def chunks(self) -> Iterator[Chunk]:
        assert self.field is not None
        return column_chunks(self.path, self.groups, self.first, self.field)

    def rows(self) -> Iterator[TableRow]:
        return parquet_rows(self.path, self.groups, self.first)


def parquet_parts(path: Path, key: str, field: str) -> Iterator[Part]:
    """The documents of column `field`: each string of it is one."""
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        if field not in names:
            raise DataError(f"{path}: {no_field(key, field, names)}")
        only_once(field, names, str(path))
        for groups, first, size in group_batches(file, PART_BYTES, field):
            if size <= LARGEST_GROUP:
                yield RowGroups(path, groups, first, size, field)
            else:
                yield from given_chunks(column_chunks(path, groups, first, field))


def parquet_tables(path: Path) -> Iterator[Table]:
    """The rows of a Parquet file. Raises DataError."""
    with open_parquet(path) as file:
        for groups, first, size in group_batches(file, PART_BYTES, None):
            part = RowGroups(path, groups, first, size)
            if size <= LARGEST_GROUP:
                yield part
            else:
                yield from given_rows(part.rows())

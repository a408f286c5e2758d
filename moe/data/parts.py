"""Parts of a source, each of which one process can read and encode, in the order of their text.

What can't be cut in a file (moe/data/file_parts.py) the process that prepares reads itself, and hands over the content.
A part is about PART_BYTES of text, however large a file is. Parts don't depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from moe.data.readers import Chunk, DataError
from moe.data.records import Shape, parse
from moe.data.tables import TableRow

PART_BYTES = 2 << 20


class Part(Protocol):
    """Part of a source's text; can be sent to another process."""

    @property
    def size(self) -> int:
        """Bytes of text, roughly."""
        ...

    def chunks(self) -> Iterator[Chunk]:
        """Raises DataError."""
        ...


class Table(Protocol):
    """Part of a source's rows; can be sent to another process."""

    @property
    def size(self) -> int: ...

    def rows(self) -> Iterator[TableRow]:
        """Raises DataError where the rest can't be read."""
        ...


@dataclass(frozen=True, slots=True)
class Several:
    """Small parts, one after the other."""

    parts: list[Part]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def chunks(self) -> Iterator[Chunk]:
        for part in self.parts:
            yield from part.chunks()


def grouped(parts: Iterable[Part]) -> Iterator[Part]:
    """The same text in parts of about PART_BYTES. What `parts` raises comes after the parts before it."""
    return (Several(batch) for batch, _ in _batched(parts, lambda part: part.size))


@dataclass(frozen=True, slots=True)
class GivenChunks:
    """Chunks that this process has read."""

    given: list[Chunk]

    @property
    def size(self) -> int:
        return sum(len(chunk.data) for chunk in self.given)

    def chunks(self) -> Iterator[Chunk]:
        return iter(self.given)


@dataclass(frozen=True, slots=True)
class GivenRows:
    """Rows that this process has read."""

    given: list[TableRow]
    size: int

    def rows(self) -> Iterator[TableRow]:
        return iter(self.given)


def given_chunks(chunks: Iterable[Chunk]) -> Iterator[GivenChunks]:
    return (GivenChunks(batch) for batch, _ in _batched(chunks, lambda chunk: len(chunk.data)))


def given_rows(rows: Iterable[TableRow]) -> Iterator[GivenRows]:
    return (GivenRows(batch, size) for batch, size in _batched(rows, _row_bytes))


def _row_bytes(row: TableRow) -> int:
    return sum(len(value) if isinstance(value, str) else 256 for value in row.values.values())


T = TypeVar("T")


def _batched(items: Iterable[T], size_of: Callable[[T], int]) -> Iterator[tuple[list[T], int]]:
    """Items in batches of about PART_BYTES. What `items` raises comes after the batches before it."""
    batch, size = list[T](), 0
    try:
        for item in items:
            batch.append(item)
            size += size_of(item)
            if size >= PART_BYTES:
                yield batch, size
                batch, size = [], 0
    except DataError:
        if batch:
            yield batch, size
        raise
    if batch:
        yield batch, size


@dataclass(frozen=True, slots=True)
class Records:
    """A table's rows as records of the kind `shape`."""

    table: Table
    shape: Shape

    @property
    def size(self) -> int:
        return self.table.size

    def chunks(self) -> Iterator[Chunk]:
        return (parse(row, self.shape) for row in self.table.rows())

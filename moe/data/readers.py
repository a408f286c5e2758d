"""Reads text files, compressed or not, as documents; every error is one line with the file and the place in it."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from moe.errors import UserError

COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
LOOKED_AT = 8192  # bytes at a text file's beginning: a NUL among them means that it is no text


class DataError(UserError):
    """Data that can't be used. Its text is one line: file, place, rule, fix."""


@dataclass(slots=True)
class Chunk:
    """Part of a document, or all of it. A chunk that doesn't start a document continues the one before it."""

    data: bytes  # valid UTF-8
    starts_document: bool = True
    others: bytes = b""  # content that the hash of the chunk, and so its split, doesn't follow

    @property
    def text(self) -> str:
        return self.data.decode()


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed as its name says. Raises DataError, also for reads within the block."""
    try:
        with _decompressed(path) as file:
            yield file
    except EOFError as error:
        raise DataError(f"{path}: the compressed file is cut short: copy it again") from error
    except (zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: not readable as {path.suffix}: {first_line(error)}") from error
    except OSError as error:
        compressed = path.suffix.lower() in COMPRESSED_SUFFIXES and error.strerror is None
        rule = f"not readable as {path.suffix}: {first_line(error)}" if compressed else error.strerror
        raise DataError(f"{path}: {rule}") from error


def _decompressed(path: Path) -> BinaryIO:
    match path.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.open(path))
        case ".bz2":
            return cast(BinaryIO, bz2.open(path))
        case ".xz":
            return cast(BinaryIO, lzma.open(path))
        case ".zst":
            import pyarrow

            with path.open("rb"):  # its error says what is wrong, pyarrow's also where in its sources
                pass
            return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 16)
    return path.open("rb")


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def blocks_of(file: BinaryIO, chunk_bytes: int) -> Iterator[bytes]:
    """A text file's bytes in blocks of about `chunk_bytes` that end with a line (or, in a long one, a character)."""
    tail = b""
    while block := file.read(chunk_bytes):
        block = tail + block + file.readline(chunk_bytes)
        # A line longer than a chunk is cut at any byte; the bytes of a cut character go into the next block.
        tail = _unfinished(block) if not block.endswith(b"\n") else b""
        yield block[: len(block) - len(tail)]
    if tail:
        yield tail


def text_chunk(block: bytes, path: Path, position: int) -> Chunk:
    """A block at `position` of a text file, which is one document. Raises DataError where it isn't UTF-8 text."""
    refuse_nul(block[: max(0, LOOKED_AT - position)], path, position)
    decode(block, path, position)
    return Chunk(block, starts_document=position == 0)


def refuse_nul(block: bytes, path: Path, position: int) -> None:
    """Raises DataError where `block`, at `position` of the file, has a NUL byte."""
    if (at := block.find(b"\0")) >= 0:
        raise DataError(
            f"{path}: byte {position + at} is NUL: the file is UTF-16 or no text; convert it to UTF-8, or leave it out"
        )


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


def decode(block: bytes, path: Path, position: int) -> str:
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        place = position + error.start
        raise DataError(f"{path}: byte {place} (0x{block[error.start]:02x}) is not UTF-8: {error.reason}") from error

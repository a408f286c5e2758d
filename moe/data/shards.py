"""Token shards on disk: `prepare` writes them, the loader reads ranges of them.

One stream of tokens per source and split, cut into files of `SHARD_TOKENS` (the last one shorter), raw little-endian
uint16 (vocabularies up to 65,536) or uint32, no header. `documents.bin` holds the stream position of every document's
first token, int64, and at its end the stream's length. A document is [BOS] tokens [EOS] and may cross from one shard
into the next.

Files are read with `pread`, not mapped: beyond the end of a file that was cut, a mapped page is a SIGBUS, which ends
the process without a word, and the rest of the last page is zeros.

Legend: N tokens of a range.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from bisect import bisect_right
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from moe.data.readers import DataError
from moe.errors import UserError
from moe.untrusted import Values

SHARD_TOKENS = 1 << 28  # 512 MiB of uint16
OFFSETS_FILE = "documents.bin"
OFFSET = np.dtype("<i8")
MOST_SHARDS = 10**6
OPEN_FILES = 32  # of one stream: it may have more shards than a process may open files
BLOCK = 512  # offsets read at once: 4 KiB
BLOCKS_KNOWN = 1 << 14  # blocks whose first offset is remembered: half of them lie on the first 13 levels of a search


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class StreamWriter:
    """Writes one stream, document by document. Raises OSError (a full disk)."""

    def __init__(self, folder: Path, dtype: np.dtype, shard_tokens: int = SHARD_TOKENS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._dtype, self._shard_tokens = folder, dtype, shard_tokens
        self._offsets = _HashedFile(folder / OFFSETS_FILE)
        self._shard: _HashedFile | None = None
        self._sha256: dict[str, str] = {}  # by file name, of the files that are complete
        self.tokens = self.documents = self.bytes = 0

    def start_document(self) -> None:
        self._offsets.write(np.array([self.tokens], OFFSET).tobytes())
        self.documents += 1

    def write(self, ids: list[int]) -> None:
        ids_N = np.asarray(ids, dtype=self._dtype)
        while len(ids_N):
            shard, used = divmod(self.tokens, self._shard_tokens)
            if used == 0:
                self._end(self._shard)
                self._shard = _HashedFile(self._folder / f"{shard:05d}.bin")
            assert self._shard is not None
            part_N, ids_N = np.split(ids_N, [self._shard_tokens - used])
            self._shard.write(part_N.tobytes())
            self.tokens += len(part_N)

    def _end(self, file: _HashedFile | None) -> None:
        if file is not None:
            self._sha256[file.path.name] = file.end()

    def close(self) -> dict[str, Any]:
        """Syncs everything to disk. Returns the stream's entry in meta.json."""
        self._end(self._shard)
        self._offsets.write(np.array([self.tokens], OFFSET).tobytes())
        self._end(self._offsets)
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "shard_tokens": self._shard_tokens,
            "sha256": self._sha256,
        }

    def abandon(self) -> None:
        """Closes the files after an error; their content is not usable."""
        for file in (self._offsets, self._shard):
            if file is not None:
                # Closing flushes the buffer, which fails again on a full disk; the first error is the one to report.
                try:
                    file.close()
                except OSError:
                    continue


class _HashedFile:
    """A new file whose SHA-256 is computed while it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file, self._sha256 = path.open("wb"), hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)

    def end(self) -> str:
        """Syncs the file to disk and closes it; its SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._sha256.hexdigest()

    def close(self) -> None:
        self._file.close()


def stream_entry(values: Values) -> dict[str, Any]:
    """A stream's entry in meta.json, as `StreamWriter.close` returned it, checked. Raises UserError."""
    for key in ("documents", "tokens", "shard_tokens"):
        values.count(key, 1)
    values.count("bytes")
    if values.values["tokens"] > MOST_SHARDS * values.values["shard_tokens"]:
        raise UserError(f"{values.where}: {values.prefix}shard_tokens makes over {MOST_SHARDS} files: {values.fix}")
    if "sha256" in values.values:
        hashes = values.object("sha256")
        for name in hashes.values:
            hashes.text(name, "[0-9a-f]{64}")
    return values.values


class TokenStream:
    """One source and split. `documents`, `tokens` and `bytes` (of UTF-8 text) are its totals.

    `files` are the paths of the shards and then `offsets`, documents.bin; `sha256` is by file name, empty where an
    earlier version wrote them. A read that meets the end of a file raises OSError, which names the file: it was cut
    after it was opened.
    """

    def __init__(self, folder: Path, meta: dict[str, Any], dtype: np.dtype, vocab_size: int) -> None:
        """Raises DataError when a file is missing, hasn't the size that meta.json implies, or documents.bin doesn't
        begin with 0 and end with the stream's length."""
        self.folder, self.dtype, self.vocab_size = folder, dtype, vocab_size
        self.documents, self.tokens, self.bytes = meta["documents"], meta["tokens"], meta["bytes"]
        self.sha256: dict[str, str] = meta.get("sha256", {})
        self._shard_tokens = meta["shard_tokens"]
        count = -(-self.tokens // self._shard_tokens)
        self._shards = [folder / f"{i:05d}.bin" for i in range(count)]
        self.offsets = folder / OFFSETS_FILE
        self.files = [*self._shards, self.offsets]
        for i, path in enumerate(self._shards):
            _check_size(path, min(self._shard_tokens, self.tokens - i * self._shard_tokens) * dtype.itemsize)
        _check_size(self.offsets, (self.documents + 1) * OFFSET.itemsize)
        self._file = lru_cache(OPEN_FILES)(_OpenFile)
        self._offset = lru_cache(BLOCKS_KNOWN)(lambda index: int(self._offsets(index, 1)[0]))
        try:
            ends = self._offset(0), self._offset(self.documents)
        except OSError as error:
            raise DataError(f"{error}: the cache is damaged") from error
        if ends != (0, self.tokens):
            raise DataError(
                f"{self.offsets}: goes from {ends[0]} to {ends[1]} instead of 0 to {self.tokens}, the stream's length: "
                "the cache is damaged"
            )

    def read(self, start: int, stop: int) -> np.ndarray:
        """[N] int64: tokens `start` … `stop` − 1. Raises DataError for an id that the tokenizer doesn't have."""
        parts = []
        while start < stop:
            shard, offset = divmod(start, self._shard_tokens)
            taken = min(stop - start, self._shard_tokens - offset)
            size = self.dtype.itemsize
            data = self._file(self._shards[shard]).read(offset * size, taken * size)
            parts.append(np.frombuffer(data, self.dtype))
            start += taken
        ids_N = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
        if len(ids_N) and int(ids_N.max()) >= self.vocab_size:
            raise DataError(
                f"{self.folder}: token id {int(ids_N.max())} must be < the tokenizer's vocabulary, {self.vocab_size}: "
                "the shards are damaged; `moe prepare verify=true` with the same data and tokenizer writes them again"
            )
        return ids_N

    def document(self, index: int, limit: int) -> np.ndarray:
        """[N] int64: the first tokens of a document, at most `limit`, its BOS included. Raises as `read` does."""
        start, stop = (int(offset) for offset in self._offsets(index, 2))
        return self.read(start, min(stop, start + limit))

    def document_ids(self, start: int, stop: int) -> np.ndarray:
        """[N] int32: which document each of tokens `start` … `stop` − 1 belongs to, counted from 0 at `start`."""
        firsts = range(0, self.documents + 1, BLOCK)
        ids_N = np.zeros(stop - start, np.int32)
        for first in firsts[bisect_right(firsts, start, key=self._offset) - 1 :]:
            offsets = self._offsets(first, min(BLOCK, self.documents + 1 - first))
            ids_N[offsets[(offsets > start) & (offsets < stop)] - start] = 1
            if offsets[-1] >= stop:
                break
        return np.cumsum(ids_N, dtype=np.int32)

    def _offsets(self, first: int, count: int) -> np.ndarray:
        """`count` entries of documents.bin from number `first`."""
        data = self._file(self.offsets).read(first * OFFSET.itemsize, count * OFFSET.itemsize)
        return np.frombuffer(data, OFFSET)


class _OpenFile:
    """A file that is read at any place; closed when nothing refers to it any more. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self._path, self._descriptor = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from byte `start`. Raises OSError, naming the file, when it ends before them."""
        data = b""
        while len(data) < size:
            try:
                part = os.pread(self._descriptor, size - len(data), start + len(data))
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._path)) from error
            if not part:
                raise OSError(
                    f"{self._path}: was cut after it was opened: it has {os.fstat(self._descriptor).st_size} bytes, "
                    f"and {start + size} are needed; the same command prepares it again"
                )
            data = data + part if data else part
        return data


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: the cache is damaged") from error
    if size != expected:
        raise DataError(f"{path}: has {size} bytes instead of {expected}: the cache is damaged")

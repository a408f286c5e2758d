"""Token shards on disk: `prepare` writes them, the loader maps them into memory.

One stream of tokens per source and split, cut into files of `SHARD_TOKENS` (the last one shorter), raw little-endian
uint16 (vocabularies up to 65,536) or uint32, no header. `documents.bin` holds the stream position of every document's
first token, int64, and at its end the stream's length. A document is [BOS] tokens [EOS] and may cross from one shard
into the next.

Legend: N tokens of a range.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moe.data.readers import DataError

SHARD_TOKENS = 1 << 28  # 512 MiB of uint16
OFFSETS_FILE = "documents.bin"


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class StreamWriter:
    """Writes one stream, document by document. Raises OSError (a full disk)."""

    def __init__(self, folder: Path, dtype: np.dtype, shard_tokens: int = SHARD_TOKENS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._dtype, self._shard_tokens = folder, dtype, shard_tokens
        self._offsets: BinaryIO = (folder / OFFSETS_FILE).open("wb")
        self._shard: BinaryIO | None = None
        self._shards = 0
        self.tokens = self.documents = self.bytes = 0

    def start_document(self) -> None:
        self._offsets.write(np.array([self.tokens], "<i8").tobytes())
        self.documents += 1

    def write(self, ids: list[int]) -> None:
        ids_N = np.asarray(ids, dtype=self._dtype)
        while len(ids_N):
            used = self.tokens % self._shard_tokens
            if used == 0:
                self._end_shard()
                self._shard = (self._folder / f"{self._shards:05d}.bin").open("wb")
                self._shards += 1
            assert self._shard is not None
            part_N, ids_N = np.split(ids_N, [self._shard_tokens - used])
            self._shard.write(part_N.tobytes())
            self.tokens += len(part_N)

    def _end_shard(self) -> None:
        if self._shard is not None:
            _sync_and_close(self._shard)
            self._shard = None

    def close(self) -> dict[str, int]:
        """Syncs everything to disk. Returns the stream's entry in meta.json."""
        self._end_shard()
        self._offsets.write(np.array([self.tokens], "<i8").tobytes())
        _sync_and_close(self._offsets)
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "shard_tokens": self._shard_tokens,
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


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


class TokenStream:
    """One source and split, mapped into memory. `documents`, `tokens` and `bytes` (of UTF-8 text) are its totals."""

    def __init__(self, folder: Path, meta: dict[str, Any], dtype: np.dtype, vocab_size: int) -> None:
        """Raises DataError when a file is missing or hasn't the size that meta.json implies."""
        self.folder, self.vocab_size = folder, vocab_size
        self.documents, self.tokens, self.bytes = int(meta["documents"]), int(meta["tokens"]), int(meta["bytes"])
        self._shard_tokens = int(meta["shard_tokens"])
        count = -(-self.tokens // self._shard_tokens)
        sizes = [min(self._shard_tokens, self.tokens - i * self._shard_tokens) for i in range(count)]
        self._shards = [_map(folder / f"{i:05d}.bin", dtype, size) for i, size in enumerate(sizes)]
        self._offsets = _map(folder / OFFSETS_FILE, np.dtype("<i8"), self.documents + 1)

    def read(self, start: int, stop: int) -> np.ndarray:
        """[N] int64: tokens `start` … `stop` − 1. Raises DataError for an id that the tokenizer doesn't have."""
        parts = []
        while start < stop:
            shard, offset = divmod(start, self._shard_tokens)
            taken = min(stop - start, self._shard_tokens - offset)
            parts.append(self._shards[shard][offset : offset + taken])
            start += taken
        ids_N = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
        if len(ids_N) and int(ids_N.max()) >= self.vocab_size:
            raise DataError(
                f"{self.folder}: token id {int(ids_N.max())} must be < the tokenizer's vocabulary, {self.vocab_size}: "
                "the shards are damaged; delete the folder and prepare again"
            )
        return ids_N

    def document(self, index: int, limit: int) -> np.ndarray:
        """[N] int64: the first tokens of a document, at most `limit`, its BOS included. Raises as `read` does."""
        start, stop = (int(offset) for offset in self._offsets[index : index + 2])
        return self.read(start, min(stop, start + limit))

    def document_ids(self, start: int, stop: int) -> np.ndarray:
        """[N] int32: which document each of tokens `start` … `stop` − 1 belongs to, counted from 0 at `start`."""
        first, last = np.searchsorted(self._offsets, [start, stop - 1], side="right")
        ids_N = np.zeros(stop - start, np.int32)
        ids_N[self._offsets[first:last] - start] = 1
        return np.cumsum(ids_N, dtype=np.int32)


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: the cache is damaged") from error
    if size != count * dtype.itemsize:
        raise DataError(f"{path}: has {size} bytes instead of {count * dtype.itemsize}: the cache is damaged")
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,)) if count else np.zeros(0, dtype)

"""Token shards on disk: `prepare` writes them, the loader reads ranges of them.

One stream of tokens per source and split, cut into files of `SHARD_TOKENS` (the last one shorter), raw little-endian
uint16 (vocabularies up to 65,536) or uint32, no header. `documents.bin` holds the stream position of every document's
first token, int64, and at its end the stream's length. A document is [BOS] tokens [EOS] and may cross from one shard
into the next.

A stream of rows for fine-tuning is packed when it is written: every `packed_length` tokens begin a sequence and a
document. Beside each shard lies a mask, a byte for each token: 1 a target, 2 what only fills up a sequence, 0 others.

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
MASK = np.dtype("u1")
MASK_SUFFIX = ".mask"
TARGET, PADDING = 1, 2  # in a mask; 0: neither
MOST_SHARDS = 10**6
OPEN_FILES = 32  # of one stream: it may have more shards than a process may open files
BLOCK = 512  # offsets read at once: 4 KiB
BLOCKS_KNOWN = 1 << 14  # blocks whose first offset is remembered: half of them lie on the first 13 levels of a search


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class StreamWriter:
    """Writes one stream, document by document; with `packed_length`, a mask too. Raises OSError (a full disk)."""

    def __init__(
        self, folder: Path, dtype: np.dtype, shard_tokens: int = SHARD_TOKENS, packed_length: int | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self.dtype, self._shard_tokens, self._packed = folder, dtype, shard_tokens, packed_length
        self._offsets = _HashedFile(folder / OFFSETS_FILE)
        self._shard: _HashedFile | None = None
        self._mask: _HashedFile | None = None
        self._sha256: dict[str, str] = {}  # by file name, of the files that are complete
        self.tokens = self.documents = self.bytes = self.targets = 0

    def start_document(self) -> None:
        self._offsets.write(np.array([self.tokens], OFFSET).tobytes())
        self.documents += 1

    def write(self, ids: list[int] | np.ndarray, mask_N: np.ndarray | None = None) -> None:
        """`mask_N`, of a packed stream, has 0, TARGET and PADDING."""
        ids_N = np.asarray(ids, dtype=self.dtype)
        while len(ids_N):
            shard, used = divmod(self.tokens, self._shard_tokens)
            if used == 0:
                self._begin(shard)
            assert self._shard is not None
            part_N, ids_N = np.split(ids_N, [self._shard_tokens - used])
            self._shard.write(part_N.tobytes())
            if self._mask is not None:
                assert mask_N is not None, "a packed stream has a mask"
                here_N, mask_N = np.split(mask_N, [self._shard_tokens - used])
                self._mask.write(here_N.astype(MASK).tobytes())
                self.targets += int((here_N == TARGET).sum())
            self.tokens += len(part_N)

    def write_documents(self, ids: bytes | np.ndarray, starts_D: np.ndarray, mask_N: np.ndarray | None = None) -> None:
        """Ids, as bytes or an array of the stream's dtype, in which documents begin at the places `starts_D`."""
        self._offsets.write((starts_D + self.tokens).astype(OFFSET).tobytes())
        self.documents += len(starts_D)
        self.write(np.frombuffer(ids, self.dtype) if isinstance(ids, bytes) else ids, mask_N)

    def _begin(self, shard: int) -> None:
        self._end(self._shard)
        self._shard = _HashedFile(self._folder / f"{shard:05d}.bin")
        if self._packed is not None:
            self._end(self._mask)
            self._mask = _HashedFile(self._folder / f"{shard:05d}{MASK_SUFFIX}")

    def _end(self, file: _HashedFile | None) -> None:
        if file is not None:
            self._sha256[file.path.name] = file.end()

    def close(self) -> dict[str, Any]:
        """Syncs everything to disk. Returns the stream's entry in meta.json."""
        self._end(self._shard)
        self._end(self._mask)
        self._offsets.write(np.array([self.tokens], OFFSET).tobytes())
        self._end(self._offsets)
        packed = {} if self._packed is None else {"packed_length": self._packed, "targets": self.targets}
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "shard_tokens": self._shard_tokens,
            **packed,
            "sha256": self._sha256,
        }

    def abandon(self) -> None:
        """Closes the files after an error; their content is not usable."""
        for file in (self._offsets, self._shard, self._mask):
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
    if "packed_length" in values.values:
        length, tokens = values.count("packed_length", 2), values.values["tokens"]
        values.count("targets", 1, tokens)
        if tokens % length:
            raise UserError(
                f"{values.where}: {values.prefix}tokens={tokens} must be sequences of {length}: {values.fix}"
            )
    if values.values["tokens"] > MOST_SHARDS * values.values["shard_tokens"]:
        raise UserError(f"{values.where}: {values.prefix}shard_tokens makes over {MOST_SHARDS} files: {values.fix}")
    if "sha256" in values.values:
        hashes = values.object("sha256")
        for name in hashes.values:
            hashes.text(name, "[0-9a-f]{64}")
    return values.values


class TokenStream:
    """One source and split. `documents`, `tokens` and `bytes` (of UTF-8 text) are its totals.

    `packed_length` is the sequence length of a stream of rows, which has `targets` and masks; None: every token is a
    target, and the stream can be cut at any length. `files` are the paths of the shards and then of the masks and
    `offsets`, documents.bin; `sha256` is by file name, empty where an
    earlier version wrote them. A read that meets the end of a file raises OSError, which names the file: it was cut
    after it was opened.
    """

    def __init__(self, folder: Path, meta: dict[str, Any], dtype: np.dtype, vocab_size: int) -> None:
        """Raises DataError when a file is missing, hasn't the size that meta.json implies, or documents.bin doesn't
        begin with 0 and end with the stream's length."""
        self.folder, self.dtype, self.vocab_size = folder, dtype, vocab_size
        self.documents, self.tokens, self.bytes = meta["documents"], meta["tokens"], meta["bytes"]
        self.sha256: dict[str, str] = meta.get("sha256", {})
        self.packed_length: int | None = meta.get("packed_length")
        self.targets: int = meta.get("targets", self.tokens)
        self._shard_tokens = meta["shard_tokens"]
        count = -(-self.tokens // self._shard_tokens)
        self._shards = [folder / f"{i:05d}.bin" for i in range(count)]
        self.offsets = folder / OFFSETS_FILE
        self._masks = [path.with_suffix(MASK_SUFFIX) for path in self._shards] if self.packed_length else []
        self.files = [*self._shards, *self._masks, self.offsets]
        for i, path in enumerate(self._shards):
            tokens = min(self._shard_tokens, self.tokens - i * self._shard_tokens)
            _check_size(path, tokens * dtype.itemsize)
            if self._masks:
                _check_size(self._masks[i], tokens * MASK.itemsize)
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
        ids_N = self._read(self._shards, self.dtype, start, stop).astype(np.int64)
        if len(ids_N) and int(ids_N.max()) >= self.vocab_size:
            raise DataError(
                f"{self.folder}: token id {int(ids_N.max())} must be < the tokenizer's vocabulary, {self.vocab_size}: "
                "the shards are damaged; `moe prepare verify=true` with the same data and tokenizer writes them again"
            )
        return ids_N

    def mask(self, start: int, stop: int) -> np.ndarray:
        """[N] uint8: TARGET, PADDING or 0 for each of tokens `start` … `stop` − 1. Raises OSError as `read` does."""
        if self.packed_length is None:
            return np.full(stop - start, TARGET, MASK)
        return self._read(self._masks, MASK, start, stop)

    def _read(self, files: list[Path], dtype: np.dtype, start: int, stop: int) -> np.ndarray:
        parts = [np.zeros(0, dtype)]
        while start < stop:
            shard, offset = divmod(start, self._shard_tokens)
            taken = min(stop - start, self._shard_tokens - offset)
            data = self._file(files[shard]).read(offset * dtype.itemsize, taken * dtype.itemsize)
            parts.append(np.frombuffer(data, dtype))
            start += taken
        return np.concatenate(parts)

    def document(self, index: int, limit: int) -> np.ndarray:
        """[N] int64: the first tokens of a document, at most `limit`, its BOS included. Raises as `read` does."""
        start, stop = (int(offset) for offset in self._offsets(index, 2))
        return self.read(start, min(stop, start + limit))

    def prompt(self, index: int, limit: int) -> np.ndarray:
        """[N] int64: a document's tokens before its first target, its BOS included; none where they are more than
        `limit`, or all tokens but the first are targets. Raises as `read` does."""
        start, stop = (int(offset) for offset in self._offsets(index, 2))
        targets_N = self.mask(start, min(stop, start + limit + 1)) == TARGET
        first = int(targets_N.argmax())
        return self.read(start, start + (first if targets_N.any() and first > 1 else 0))

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

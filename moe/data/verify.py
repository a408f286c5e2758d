"""Whether a prepared corpus holds the bytes that were written: SHA-256, token ids and document positions of every file.

That reads the whole corpus, so it is done once on each machine: a note in the machine's folder for temporary files
records the sizes and times of the files and what was found. Other processes of the machine wait for the one that reads.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from moe.data.readers import DataError
from moe.data.shards import MASK_SUFFIX, OFFSET, PADDING, TokenStream

READ_BYTES = 1 << 22
THREADS = 8  # files read at once: while one is hashed, hashlib and numpy let the other threads run
WORTH_A_LINE = 1 << 30  # bytes that take seconds to read


def verify(folder: Path, streams: list[TokenStream], *, again: bool, log: Callable[[str], None]) -> dict[Path, str]:
    """Reads every file of a corpus, unless this machine has done so and `again` is false; the SHA-256 of what was read.

    Raises DataError, which names the first damaged file.
    """
    files = [(path, stream) for stream in streams for path in stream.files]
    with _open_note(folder, log) as note:
        stats = [_stat(path) for path, _ in files]
        known = _read(note)
        if known.get("files") == stats and not again:
            if known["damage"] is not None:
                raise DataError(known["damage"])
            return {}
        size = sum(stat[1] for stat in stats)
        if size >= WORTH_A_LINE:
            log(f"checking {size / 1e9:,.1f} GB of token shards, once on this machine: {folder}")
        damage, found = None, {}
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                hashes = pool.map(lambda file: _check(*file), files)
                found = dict(zip((path for path, _ in files), hashes, strict=True))
        except DataError as error:
            damage = str(error)
        if [_stat(path) for path, _ in files] == stats:
            _write(note, {"folder": str(folder), "files": stats, "damage": damage})
    if damage is not None:
        raise DataError(damage)
    if again:
        log(f"verified {len(files)} files, {size / 1e6:,.1f} MB: {folder}")
    return found


def _check(path: Path, stream: TokenStream) -> str:
    """Reads one file of `stream`; its SHA-256. Raises DataError when it can't hold what was written."""
    digest, last = hashlib.sha256(), -1
    try:
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
                if path == stream.offsets:
                    offsets = np.frombuffer(block, OFFSET)
                    if (np.diff(offsets, prepend=last) <= 0).any():
                        raise DataError(f"{path}: a document doesn't begin after the one before: the cache is damaged")
                    last = offsets[-1]
                elif path.suffix == MASK_SUFFIX:
                    if max(block) > PADDING:
                        raise DataError(f"{path}: a mask has 0, 1 and 2 alone: the cache is damaged")
                elif (highest := int(np.frombuffer(block, stream.dtype).max())) >= stream.vocab_size:
                    raise DataError(
                        f"{path}: token id {highest} must be < the tokenizer's vocabulary, {stream.vocab_size}: the "
                        "cache is damaged"
                    )
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: the cache is damaged") from error
    found = digest.hexdigest()
    if found != stream.sha256.get(path.name, found):
        raise DataError(f"{path}: holds other bytes than were written (SHA-256 differs): the cache is damaged")
    return found


def _stat(path: Path) -> list[Any]:
    """Path, size and times. The time of the inode's change shows a file whose modification time was set back."""
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: the cache is damaged") from error
    return [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


@contextmanager
def _open_note(folder: Path, log: Callable[[str], None]) -> Iterator[TextIO | None]:
    """This machine's note about the corpus in `folder`, locked; None where none can be kept."""
    # A user's own folder: a note that another user wrote would hide a damage.
    place = Path(tempfile.gettempdir()) / f"moe-verified-{os.getuid()}"
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        if place.lstat().st_uid != os.getuid():
            raise PermissionError(f"{place} belongs to another user")
        file = (place / f"{name}.json").open("a+", encoding="utf-8")
    except OSError as error:
        log(f"can't remember that a corpus was checked, so it is checked at every start: {error}")
        yield None
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _read(note: TextIO | None) -> dict[str, Any]:
    if note is None:
        return {}
    note.seek(0)
    try:
        known = json.load(note)
    except ValueError:  # new, or its writer was killed: the corpus is read
        return {}
    return known if isinstance(known, dict) and "damage" in known else {}


def _write(note: TextIO | None, content: dict[str, Any]) -> None:
    if note is not None:
        note.truncate(0)
        json.dump(content, note)

"""Where text comes from: files, folders, globs, JSONL, Parquet, `datasets`, and the built-in domains.

A source streams `Piece`s, each at most about a mebibyte of text for files (one row for the other formats), so memory
doesn't grow with the corpus. What can't be read raises `DataError`, one line that names the file and the place.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.config import DataConfig, SourceConfig, SourceFormat
from moe.data import stdlib

MAX_PIECE_BYTES = 1 << 20
MIN_PIECE_BYTES = 1 << 10
MIN_PIECES = 64  # fewer text files than this are cut, so that a held-out share can be taken of one long book too
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIXES = (".parquet",)
PICKLE_SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz", ".dill")
SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class DataError(ValueError):
    """Data that can't be used: one line naming the file, the place, the rule and what to do."""


@dataclass(slots=True)
class Piece:
    """A stretch of text. `starts` opens a document; else it continues the piece before it (of one text file)."""

    text: str
    data: bytes  # the same in UTF-8
    starts: bool = True


@dataclass(slots=True)
class Source:
    """One named corpus. `identity` is cheap to compute and changes when the source may have changed."""

    name: str
    description: str
    identity: list[Any]
    modified_ns: int  # newest file's modification time; 0 where there are no files
    read: Callable[[], Iterator[Piece]]

    def pieces(self) -> Iterator[Piece]:
        """Every piece in a fixed order, empty ones left out. Raises DataError."""
        return (piece for piece in self.read() if piece.data)


def open_sources(data: DataConfig) -> list[Source]:
    """The configured sources, found and recognised but not yet read. Raises DataError."""
    sources = []
    for name, config in data.all_sources().items():
        key = "data" if data.path is not None else f"data.sources.{name}"
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise DataError(f"{key}: the name {name!r} must be letters, digits, '_', '-' and '.': it names a folder")
        sources.append(_open(name, key, config))
    return sources


def _open(name: str, key: str, config: SourceConfig) -> Source:
    if config.format is SourceFormat.stdlib:
        return _open_stdlib(name, key, config.path)
    path = Path(config.path).expanduser()
    if config.format is SourceFormat.dataset or (config.format is SourceFormat.auto and _is_saved_dataset(path)):
        return _open_dataset(name, key, config, path)
    paths = _expand(key, config, path)
    if paths is None:
        return _open_dataset(name, key, config, path)
    return _open_files(name, key, config, paths)


def _open_stdlib(name: str, key: str, domain: str) -> Source:
    if domain not in stdlib.DOMAINS:
        raise DataError(f"{key}.path={domain} must be one of {', '.join(stdlib.DOMAINS)} for format=stdlib")
    paths = stdlib.files(domain)
    if not paths and domain != "arithmetic":
        raise DataError(
            f"{key}.path={domain}: this Python carries no library source; use data=files data.path=FILE_OR_FOLDER"
        )
    identity, modified = _stat(key, paths)

    def read() -> Iterator[Piece]:
        return (Piece(text, text.encode()) for text in stdlib.documents(domain))

    return Source(name, f"stdlib:{domain}", ["stdlib", domain, *identity], modified, read)


def _is_saved_dataset(path: Path) -> bool:
    return any((path / marker).is_file() for marker in SAVED_DATASET_FILES)


def _expand(key: str, config: SourceConfig, path: Path) -> list[Path] | None:
    """The files a path, folder or glob names, sorted; None where it looks like a data set on the Hub instead."""
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = (found for found in path.rglob("*") if found.is_file())
        found = sorted(p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts))
        if not found:
            raise DataError(f"{key}.path={config.path}: the folder holds no files")
        return found
    if glob.has_magic(config.path):
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not found:
            raise DataError(f"{key}.path={config.path}: the glob matches no file (working folder: {Path.cwd()})")
        return found
    looks_like_file = path.suffix in (".txt", ".md", ".py", *JSONL_SUFFIXES, *PARQUET_SUFFIXES, *PICKLE_SUFFIXES)
    if config.format is SourceFormat.auto and HUB_NAME.fullmatch(config.path) and not looks_like_file:
        return None
    raise DataError(f"{key}.path={config.path}: no such file or folder (working folder: {Path.cwd()})")


def _stat(key: str, paths: list[Path]) -> tuple[list[Any], int]:
    """[path, size, mtime] of every file, and the newest mtime in nanoseconds."""
    try:
        stats = [(str(path.resolve()), path.stat()) for path in paths]
    except OSError as error:
        raise DataError(f"{key}.path: {error.filename}: {error.strerror}") from error
    identity = [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    return identity, max((stat.st_mtime_ns for _, stat in stats), default=0)


def _open_files(name: str, key: str, config: SourceConfig, paths: list[Path]) -> Source:
    for path in paths:
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise DataError(f"{path}: {path.suffix} files may be pickles, which run code when read: never opened")
    identity, modified = _stat(key, paths)
    readers = [_format_of(config.format, path) for path in paths]
    texts = [size for reader, (_, size, _) in zip(readers, identity, strict=True) if reader is SourceFormat.text]
    piece_bytes = MAX_PIECE_BYTES
    if len(texts) < MIN_PIECES:
        piece_bytes = min(MAX_PIECE_BYTES, max(MIN_PIECE_BYTES, sum(texts) // MIN_PIECES))

    def read() -> Iterator[Piece]:
        for path, reader in zip(paths, readers, strict=True):
            if reader is SourceFormat.jsonl:
                yield from _read_jsonl(path, key, config.text_field)
            elif reader is SourceFormat.parquet:
                yield from _read_parquet(path, key, config.text_field)
            else:
                yield from _read_text(path, piece_bytes)

    kinds = sorted({reader.value for reader in readers})
    settings = ["files", config.format.value, config.text_field]
    return Source(name, f"{'+'.join(kinds)}:{config.path}", [*settings, *identity], modified, read)


def _format_of(stated: SourceFormat, path: Path) -> SourceFormat:
    if stated is not SourceFormat.auto:
        return stated
    suffix = path.suffix.lower()
    if suffix in JSONL_SUFFIXES:
        return SourceFormat.jsonl
    return SourceFormat.parquet if suffix in PARQUET_SUFFIXES else SourceFormat.text


def _read_text(path: Path, piece_bytes: int) -> Iterator[Piece]:
    """One document per file, in pieces of `piece_bytes` that end with a line (or, in a very long one, a character)."""
    starts, position = True, 0
    try:
        with path.open("rb") as file:
            tail = b""
            while block := file.read(piece_bytes):
                block = tail + block + file.readline(piece_bytes)
                # A line longer than a piece is cut anywhere: bytes of an unfinished character wait for the rest.
                tail = _unfinished(block) if not block.endswith(b"\n") else b""
                block = block[: len(block) - len(tail)]
                yield Piece(_decode(block, path, position), block, starts)
                starts, position = False, position + len(block)
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


def _read_jsonl(path: Path, key: str, field: str) -> Iterator[Piece]:
    """One document per line, its `field`; blank lines are skipped."""
    position = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = _decode(line, path, position)
                position += len(line)
                if not text.strip():
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
                    raise DataError(f"{path}:{number}: {_no_field(key, field, list(row))}")
                yield _row(row[field], field, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def _no_field(key: str, field: str, names: list[str]) -> str:
    return f"no field {field!r}; it has {', '.join(map(str, names)) or 'none'}: set {key}.text_field"


def _row(value: Any, field: str, place: str) -> Piece:
    """A row's text as a document. Raises DataError naming the place when it isn't text."""
    if not isinstance(value, str):
        shown = "null" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{place}: field {field!r} must be a string, is {shown}")
    try:
        return Piece(value, value.encode("utf-8"))
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        wrong = f"U+{ord(value[error.start]):04X}"
        raise DataError(f"{place}: field {field!r} holds a lone surrogate ({wrong}), which is not text") from error


def _read_parquet(path: Path, key: str, field: str) -> Iterator[Piece]:
    """One document per row, its column `field`."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise DataError(f"{path}: {_no_field(key, field, names)}")
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield _row(value, field, f"{path}: row {number}")
                    number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not readable as Parquet: {str(error).splitlines()[0]}") from error


def _open_dataset(name: str, key: str, config: SourceConfig, path: Path) -> Source:
    """A folder that `save_to_disk` wrote, or what `load_dataset` finds by name (the Hub) or folder."""
    rows = _load_dataset(key, config, path)
    column_names = list(rows.column_names)
    if config.text_field not in column_names:
        raise DataError(f"{key}.path={config.path}: {_no_field(key, config.text_field, column_names)}")
    rows = rows.select_columns([config.text_field])  # so that images and audio beside the text are never decoded
    place = f"{config.path} ({config.split})"

    def read() -> Iterator[Piece]:
        for number, row in enumerate(rows):
            yield _row(row[config.text_field], config.text_field, f"{place}: row {number}")

    identity: list[Any] = ["dataset", config.path, config.subset, config.split, config.text_field]
    files, modified = _stat(key, sorted({Path(file["filename"]) for file in rows.cache_files}))
    description = ":".join(filter(None, ("dataset", config.path, config.subset, config.split)))
    return Source(name, description, [*identity, len(rows), *files], modified, read)


def _load_dataset(key: str, config: SourceConfig, path: Path) -> Any:
    import datasets  # a second or two: only where it is used

    try:
        if _is_saved_dataset(path):
            loaded = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.DatasetDict):
                if config.split not in loaded:
                    raise DataError(f"{key}.split={config.split} must be one of {', '.join(map(str, loaded))}")
                loaded = loaded[config.split]
            return loaded
        return datasets.load_dataset(str(config.path), config.subset, split=config.split)
    except DataError:
        raise
    # `datasets` raises whatever its readers raise, from ConnectionError to StopIteration: all of it is bad input here.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{key}.path={config.path}: `datasets` can't load it: {reason}") from error

"""Where text comes from: files of all formats, folders, globs, `datasets`, and the built-in domains.

A source is a stream of `Chunk`s, so memory doesn't grow with the corpus: about a mebibyte of a text file at most, or
one row of the other formats. Where rows are fine-tuning's, each is a `DataRecord`. Text that can't be read raises
`DataError`, one line that names the file and the place.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from moe.config import DataConfig, RecordKind, SourceConfig, SourceFormat
from moe.data import stdlib
from moe.data.file_parts import JsonDocuments, line_parts, parquet_parts, parquet_tables, text_parts
from moe.data.find import expanded, find
from moe.data.formats import format_of
from moe.data.parts import Part, Records, Table, given_chunks, given_rows, grouped
from moe.data.readers import Chunk, DataError, first_line
from moe.data.records import Shape, shape_of
from moe.data.rows import DELIMITERS, as_chunk, column, no_field, read_csv
from moe.data.tables import TableRow, csv_rows, dataset_rows
from moe.errors import shown

MAX_CHUNK_BYTES = 1 << 20
MIN_CHUNK_BYTES = 1 << 10
MIN_CHUNKS = 64  # fewer text files are cut into about so many chunks, so that one long book has held-out text too
ROWS = (SourceFormat.jsonl, SourceFormat.parquet, SourceFormat.csv, SourceFormat.tsv)
SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")


@dataclass(slots=True)
class Source:
    """One named source of text. `identity` is cheap to compute and changes whenever the text may have changed."""

    name: str
    description: str
    identity: list[Any]
    modified_ns: int  # newest file's modification time; 0 where there are no files
    parts: Callable[[], Iterator[Part]]  # of its text, in a fixed order
    bytes: int = 0  # of its files
    taken: str = ""  # of a folder or glob: one line with what is read and what is left out
    tables: Callable[[], list[Iterator[Table]]] | None = None  # of records: the rows of each file
    shape_of: Callable[[TableRow], Shape] | None = None  # of records: their kind, by the first; raises DataError

    @property
    def has_records(self) -> bool:
        return self.tables is not None

    def chunks(self) -> Iterator[Chunk]:
        """Every chunk but empty ones, in a fixed order. Raises DataError."""
        return (chunk for part in self.parts() for chunk in part.chunks() if chunk.data)


def open_sources(data: DataConfig) -> list[Source]:
    """The configured sources, located and their formats known, but not yet read. Raises DataError."""
    return [_open(*stated) for stated in _stated(data)]


def open_tables(data: DataConfig) -> list[Source]:
    """The configured sources as rows for fine-tuning, whose kind is not yet known. Raises DataError."""
    for _, key, _, kind in _stated(data):
        if kind is RecordKind.documents:
            raise DataError(f"{key}.records=documents has no rows for fine-tuning: leave this source out here")
    return [_open_tables(*stated) for stated in _stated(data)]


def _stated(data: DataConfig) -> Iterator[tuple[str, str, SourceConfig, RecordKind]]:
    """(name, key in the configuration, source, kind of its rows) of every source. Raises DataError."""
    for name, config in data.all_sources().items():
        key = "data" if data.path is not None else f"data.sources.{name}"
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise DataError(f"{key}: the name {name!r} must be letters, digits, '_', '-' and '.': it names a folder")
        yield name, key, config, config.records or data.records


def stated_weights(data: DataConfig) -> dict[str, float]:
    """The weights in the configuration, by source; empty if it has none, and then sources are weighted by tokens."""
    return {name: source.weight for name, source in data.all_sources().items() if source.weight is not None}


def _open(name: str, key: str, config: SourceConfig, kind: RecordKind) -> Source:
    if kind is not RecordKind.documents:
        return _open_records(name, key, config, kind)
    if config.format is SourceFormat.stdlib:
        _require_used(key, config, {SourceFormat.stdlib})
        return _open_stdlib(name, key, config.path)
    if _is_dataset(key, config):
        return _open_dataset(name, key, config, expanded(f"{key}.path", config.path))
    return _open_files(name, key, config)


def _is_dataset(key: str, config: SourceConfig) -> bool:
    return config.format is SourceFormat.dataset or (
        config.format is SourceFormat.auto and _is_saved_dataset(expanded(f"{key}.path", config.path))
    )


def _open_records(name: str, key: str, config: SourceConfig, kind: RecordKind) -> Source:
    """Rows of files or a data set, of the kind that the first one has, or the stated one."""
    source = _open_tables(name, key, config, kind)
    assert source.tables is not None
    assert source.shape_of is not None
    first = next((row for tables in source.tables() for table in tables for row in table.rows()), None)
    if first is None:
        raise DataError(f"{key}.path={shown(config.path, 200)}: is empty: it holds no row")
    if first.problem:
        raise DataError(f"{first.place}: {first.problem}")
    shape = source.shape_of(first)
    tables = source.tables

    source.parts = lambda: grouped(Records(table, shape) for table in chain.from_iterable(tables()))
    source.description = f"{shape.kind.name}:{source.description}"
    columns = [config.text_field, config.prompt_field, config.completion_field, config.messages_field]
    source.identity = ["records", kind.name, *columns, *source.identity]
    return source


def _open_tables(name: str, key: str, config: SourceConfig, kind: RecordKind) -> Source:
    """A source whose rows are whole: its `tables` are known, but not the rows' kind. Raises DataError."""

    def shape(row: TableRow) -> Shape:
        return shape_of(row, key, config, kind)

    if config.format is not SourceFormat.stdlib and _is_dataset(key, config):
        rows = _load_dataset(key, config, expanded(f"{key}.path", config.path))
        place = f"{config.path} ({config.split})"
        source = _of_dataset(name, key, config, rows)
        source.tables, source.shape_of = lambda: [given_rows(dataset_rows(rows, place))], shape
        return source
    source, paths, readers = _of_files(name, key, config)
    other = next((path for path, reader in zip(paths, readers, strict=True) if reader not in ROWS), None)
    if other is not None or config.format is SourceFormat.stdlib:
        raise DataError(
            f"{other or f'{key}.format=stdlib'}: is text without rows, and fine-tuning reads rows (JSONL, CSV, TSV, "
            f"Parquet, a data set): to pack it as documents, set {key}.records=documents"
        )
    source.tables = lambda: [_tables(path, reader) for path, reader in zip(paths, readers, strict=True)]
    source.shape_of = shape
    return source


def _tables(path: Path, reader: SourceFormat) -> Iterator[Table]:
    if reader is SourceFormat.jsonl:
        yield from line_parts(path)
    elif reader is SourceFormat.parquet:
        yield from parquet_tables(path)
    else:
        yield from given_rows(csv_rows(path, DELIMITERS[reader.value]))


def _open_stdlib(name: str, key: str, domain: str) -> Source:
    if domain not in stdlib.DOMAINS:
        raise DataError(f"{key}.path={domain} must be one of {', '.join(stdlib.DOMAINS)} for format=stdlib")
    paths = stdlib.files(domain)
    if not paths and domain != "arithmetic":
        raise DataError(
            f"{key}.path={domain}: this Python comes without library sources; use data=files data.path=FILE_OR_FOLDER"
        )
    identity, modified = _stat(key, paths)

    @cache
    def texts() -> list[str]:  # a few megabytes, parsed once although a preparation reads them several times
        return list(stdlib.documents(domain))

    def read() -> Iterator[Chunk]:
        try:
            for text in texts():
                yield Chunk(text.encode())
        except (OSError, SyntaxError, UnicodeError) as error:
            raise DataError(f"{key}.path={domain}: this Python's library can't be read: {error}") from error

    return Source(name, f"stdlib:{domain}", ["stdlib", domain, *identity], modified, lambda: given_chunks(read()))


def _is_saved_dataset(path: Path) -> bool:
    return any(os.path.isfile(path / marker) for marker in SAVED_DATASET_FILES)


def _stat(key: str, paths: list[Path]) -> tuple[list[Any], int]:
    """[path, size, mtime] of every file, and the newest mtime in nanoseconds."""
    try:
        stats = [(str(path.resolve()), path.stat()) for path in paths]
    except OSError as error:
        raise DataError(f"{key}.path: {error.filename}: {error.strerror}") from error
    identity = [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    return identity, max((stat.st_mtime_ns for _, stat in stats), default=0)


def _of_files(name: str, key: str, config: SourceConfig) -> tuple[Source, list[Path], list[SourceFormat]]:
    """The source, not yet readable, its files and their formats."""
    found = find(key, config.path, config.format)
    paths = found.files
    identity, modified = _stat(key, paths)
    readers = [format_of(config.format, path) for path in paths]
    _require_used(key, config, set(readers))
    kinds = Counter(reader.value for reader in readers)
    taken = ""
    if found.several:
        formats = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        taken = f"source {name!r}: {len(paths)} file{'s' if len(paths) > 1 else ''} ({formats}){found.left_out()}"
    description = f"{'+'.join(sorted(kinds))}:{config.path}"
    settings = ["files", config.format.value, config.text_field]
    size = sum(size for _, size, _ in identity)
    return Source(name, description, [*settings, *identity], modified, _not_read, size, taken), paths, readers


def _not_read() -> Iterator[Part]:
    raise AssertionError("the source has no reader yet")


def _open_files(name: str, key: str, config: SourceConfig) -> Source:
    source, paths, readers = _of_files(name, key, config)
    identity = source.identity[3:]
    texts = [size for reader, (_, size, _) in zip(readers, identity, strict=True) if reader is SourceFormat.text]
    chunk_bytes = MAX_CHUNK_BYTES
    if len(texts) < MIN_CHUNKS:
        chunk_bytes = min(MAX_CHUNK_BYTES, max(MIN_CHUNK_BYTES, sum(texts) // MIN_CHUNKS))

    def parts() -> Iterator[Part]:
        for path, reader in zip(paths, readers, strict=True):
            if reader is SourceFormat.jsonl:
                yield from (JsonDocuments(lines, key, config.text_field) for lines in line_parts(path))
            elif reader is SourceFormat.parquet:
                yield from parquet_parts(path, key, config.text_field)
            elif reader.value in DELIMITERS:
                yield from given_chunks(read_csv(path, key, config.text_field, DELIMITERS[reader.value]))
            else:
                yield from text_parts(path, chunk_bytes)

    source.parts = lambda: grouped(parts())
    return source


def _require_used(key: str, config: SourceConfig, readers: set[SourceFormat]) -> None:
    """Raises DataError naming a key that nothing in this source reads."""
    default = SourceConfig()
    if config.text_field != default.text_field and not readers - {SourceFormat.text, SourceFormat.stdlib}:
        raise DataError(
            f"{key}.text_field={shown(config.text_field)} is read by no file of this source, which is plain text: "
            f"leave it out, or state {key}.format=jsonl, csv, tsv or parquet"
        )
    for field in ("subset", "split"):
        if (value := getattr(config, field)) != getattr(default, field):
            raise DataError(f"{key}.{field}={shown(str(value))} is read for data sets only: leave it out")


def _open_dataset(name: str, key: str, config: SourceConfig, path: Path) -> Source:
    """A folder that `save_to_disk` wrote, or anything that `load_dataset` opens: a folder or a name on the Hub."""
    rows = _load_dataset(key, config, path)
    column_names = list(rows.column_names)
    if config.text_field not in column_names:
        raise DataError(f"{key}.path={config.path}: {no_field(key, config.text_field, column_names)}")
    rows = rows.select_columns([config.text_field])  # so that images and audio in other columns are never decoded
    place = f"{config.path} ({config.split})"

    def read() -> Iterator[Chunk]:
        for number, text in enumerate(column(rows, config.text_field, place)):
            yield as_chunk(text, config.text_field, f"{place}: row {number}")

    source = _of_dataset(name, key, config, rows)
    source.parts = lambda: given_chunks(read())
    return source


def _of_dataset(name: str, key: str, config: SourceConfig, rows: Any) -> Source:
    """The source, not yet readable."""
    identity: list[Any] = ["dataset", config.path, config.subset, config.split, config.text_field]
    files, modified = _stat(key, sorted({Path(file["filename"]) for file in rows.cache_files}))
    description = ":".join(filter(None, ("dataset", config.path, config.subset, config.split)))
    return Source(
        name, description, [*identity, len(rows), *files], modified, _not_read, sum(size for _, size, _ in files)
    )


def _load_dataset(key: str, config: SourceConfig, path: Path) -> Any:
    import datasets  # takes a second or two, so it is imported only where it is used

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
    # `datasets` lets any exception of its readers through, from ConnectionError to StopIteration: all mean bad input.
    except Exception as error:
        missing = "" if path.exists() else "no such file or folder, and "
        raise DataError(f"{key}.path={config.path}: {missing}`datasets` can't load it: {first_line(error)}") from error

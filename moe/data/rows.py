"""Reads JSONL, CSV, TSV and Parquet: each row's text is a document; every error is one line with the file and the row.

`key` is the source's, for messages; `field` is the column with the text.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe.data.readers import Chunk, DataError, decode, first_line, opened, refuse_nul
from moe.errors import shown

DELIMITERS = {"csv": ",", "tsv": "\t"}
LONGEST_FIELD = 1 << 30  # characters; the csv module's own limit, 128 KiB, is less than many a document
NAMES_SHOWN = 20
TUNING = {"messages", "conversations", "prompt", "completion"}  # fields of rows for fine-tuning (`moe.data.records`)
# As floats, numbers may have any number of digits; they aren't text in any case.
_READ = json.JSONDecoder(parse_int=float).decode


def jsonl_chunks(lines: Iterator[tuple[int, int, bytes]], path: Path, key: str, field: str) -> Iterator[Chunk]:
    """One document per line: its string `field`. Blank lines are skipped. `lines` are (number, position, line)."""
    first = False
    for number, position, line in lines:
        first = first or number == 1
        text = decode(line.rstrip(b"\r\n"), path, position)
        line = b""  # a row may have many megabytes, so no copy of it is kept longer than needed
        if not text or text.isspace():
            continue
        if first and text.removeprefix("\ufeff").lstrip().startswith("["):
            raise json_array(path, number)
        first = False
        value = _value(text, f"{path}:{number}", key, field)
        text = ""
        chunk, value = as_chunk(value, field, f"{path}:{number}"), None
        yield chunk


def json_array(path: Path, line: int) -> DataError:
    return DataError(
        f"{path}:{line}: begins a JSON array, but each line must be one JSON object: "
        f"`jq -c '.[]' {path.name} > {path.stem}.jsonl` makes such lines"
    )


def _value(text: str, place: str, key: str, field: str) -> Any:
    """What a line of JSON has as `field`."""
    text = text.removeprefix("\ufeff")
    try:
        row = _READ(text)
        if not isinstance(row, dict):
            raise DataError(f"{place}: must be a JSON object, is {kind_of(row)}")
        if field not in row:
            raise DataError(f"{place}: {no_field(key, field, list(row))}")
        if text.count(json.dumps(field)) > 1:  # may be a text or a key further inside
            pairs = json.loads(text, parse_int=float, object_pairs_hook=list)
            only_once(field, [name for name, _ in pairs], place)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: broken JSON at column {error.colno}: {error.msg}: each line must be one JSON object"
        ) from error
    except RecursionError as error:
        raise DataError(f"{place}: broken JSON: nested too deeply") from error
    return row[field]


def read_csv(path: Path, key: str, field: str, delimiter: str) -> Iterator[Chunk]:
    """One document per row below the header; quotes as in RFC 4180, for tabs too."""
    rows = csv_lines(path, delimiter)
    place, header = next(rows, ("", []))
    if not header:
        return
    if field not in header:
        raise DataError(f"{place}: {no_field(key, field, header)}{other_delimiter(header, delimiter)}")
    only_once(field, header, place)
    column = header.index(field)
    for place, row in rows:
        if len(row) != len(header):
            raise DataError(f"{place}: {wrong_width(row, header, delimiter)}")
        yield as_chunk(row[column], field, place)


def csv_lines(path: Path, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """(file:line where it begins, fields) of each row that isn't blank, the header's first. Raises DataError."""
    csv.field_size_limit(LONGEST_FIELD)  # one setting for the process
    with opened(path) as file:
        rows = csv.reader(_lines(file, path), delimiter=delimiter, strict=True)
        while True:
            place = f"{path}:{rows.line_num + 1}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(f"{place}: {_csv_rule(str(error))}") from error
            if row:
                yield place, row


def wrong_width(row: list[str], header: list[str], delimiter: str) -> str:
    return f"has {len(row)} fields, the header {len(header)}: quote fields that hold {delimiter!r}"


def _lines(file: Iterable[bytes], path: Path) -> Iterator[str]:
    position = 0
    for line in file:
        refuse_nul(line, path, position)
        text = decode(line, path, position)
        yield text if position else text.removeprefix("\ufeff")
        position += len(line)


def _csv_rule(error: str) -> str:
    """The csv module's message, as a rule for the file."""
    if "unexpected end of data" in error:
        return "a quote that opens a field in this row is never closed"
    if "new-line character" in error:
        return "a carriage return outside quotes: lines must end with \\n or \\r\\n"
    if "field larger" in error:
        return f"a field of more than {LONGEST_FIELD} characters: is a quote never closed?"
    return f"broken quotes: {error}: a quote inside a quoted field is written twice"


def other_delimiter(header: list[str], delimiter: str) -> str:
    other = next((one for one in ";,|\t" if one != delimiter and one in header[0]), None) if len(header) == 1 else None
    return f", or separate columns by {delimiter!r} instead of {other!r}" if other else ""


def column_chunks(path: Path, groups: list[int], first: int, field: str) -> Iterator[Chunk]:
    """The string column `field` of some row groups of a Parquet file; their first row has the number `first`."""
    number = first
    try:
        with open_parquet(path) as file:
            for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=[field]):
                for value in batch.column(batch.schema.get_field_index(field)):
                    yield as_chunk(value.as_py(), field, f"{path}: row {number}")
                    number += 1
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: row {number}: field {field!r} is not UTF-8: {error.reason}") from error


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile. Raises DataError, also for reads within the block."""
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (DataError, UnicodeDecodeError):
        raise
    except Exception as error:  # damaged metadata ends in exceptions of any kind
        raise not_parquet(path, error) from error


def group_batches(file: Any, part_bytes: int, field: str | None) -> Iterator[tuple[list[int], int, int]]:
    """(row groups, number of their first row, bytes of column `field` or of all) of about `part_bytes` each."""
    groups, first, size, row = list[int](), 0, 0, 0
    for number in range(file.metadata.num_row_groups):
        about = file.metadata.row_group(number)
        columns = [about.column(index) for index in range(about.num_columns)]
        groups.append(number)
        size += sum(one.total_uncompressed_size for one in columns if field in (None, one.path_in_schema))
        row += about.num_rows
        if size >= part_bytes:
            yield groups, first, size
            groups, first, size = [], row, 0
    if groups:
        yield groups, first, size


def not_parquet(path: Path, error: Exception) -> DataError:
    """The message for what the Parquet reader raised."""
    reason = error.strerror if isinstance(error, OSError) else None
    return DataError(f"{path}: {reason or f'not readable as Parquet: {first_line(error)}'}")


def column(rows: Iterable[Any], field: str, place: str) -> Iterator[Any]:
    """`field` of every row of a `datasets` table."""
    try:
        for row in rows:
            yield row[field]
    except Exception as error:  # `datasets` lets any exception of its readers through
        raise DataError(f"{place}: `datasets` can't read it: {first_line(error)}") from error


def only_once(field: str, names: list[str], place: str) -> None:
    if (times := names.count(field)) > 1:
        raise DataError(f"{place}: has {times} fields named {field!r}: rename all but one")


def no_field(key: str, field: str, names: list[str]) -> str:
    """The message for a row or table without `field`."""
    if TUNING & set(names):
        return (
            f"no field {field!r}; it has {listed(names)}: add data=sft to train on such rows, or set {key}.text_field"
        )
    return f"no field {field!r}; it has {listed(names)}: set {key}.text_field"


def listed(names: list[str]) -> str:
    """The names of columns, for a message."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    there = ", ".join(shown(str(name)) or "''" for name in names[:NAMES_SHOWN])
    return f"{there or 'none'}{more}"


def as_chunk(value: Any, field: str, place: str) -> Chunk:
    """A row's value as a document. Raises DataError, naming the place, when it isn't text."""
    if not isinstance(value, str):
        raise DataError(f"{place}: field {field!r} must be a string, is {kind_of(value)}")
    try:
        return Chunk(value.encode("utf-8"))
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        wrong = f"U+{ord(value[error.start]):04X}"
        raise DataError(f"{place}: field {field!r} holds a lone surrogate ({wrong}), which is not text") from error


def kind_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "a number"
    return f"a {type(value).__name__}"

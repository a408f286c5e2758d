"""Reads JSONL, CSV, TSV and Parquet: each row's text is a document; every error is one line with the file and the row.

`key` is the source's, for messages; `field` is the column with the text.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moe.data.readers import Chunk, DataError, decode, first_line, opened, refuse_nul
from moe.errors import shown

DELIMITERS = {"csv": ",", "tsv": "\t"}
LONGEST_FIELD = 1 << 30  # characters; the csv module's own limit, 128 KiB, is less than many a document
NAMES_SHOWN = 20


def read_jsonl(path: Path, key: str, field: str) -> Iterator[Chunk]:
    """One document per line: its string `field`. Blank lines are skipped."""
    position = number = rows = 0
    with opened(path) as file:
        while line := file.readline():
            number += 1
            text = decode(line.rstrip(b"\r\n"), path, position)
            position += len(line)
            line = b""  # a row may have many megabytes, so no copy of it is kept longer than needed
            if not text or text.isspace():
                continue
            rows += 1
            if rows == 1 and text.removeprefix("\ufeff").lstrip().startswith("["):
                raise json_array(path, number)
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
        # As floats, numbers may have any number of digits; they aren't text in any case.
        row = json.loads(text, parse_int=float)
        if not isinstance(row, dict):
            raise DataError(f"{place}: must be a JSON object, is {kind_of(row)}")
        if field not in row:
            raise DataError(f"{place}: {no_field(key, field, list(row))}")
        if text.count(json.dumps(field)) > 1:  # may be a text or a key further inside
            pairs = json.loads(text, parse_int=float, object_pairs_hook=list)
            _once(field, [name for name, _ in pairs], place)
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
    _once(field, header, place)
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


def read_parquet(path: Path, key: str, field: str) -> Iterator[Chunk]:
    """One document per row: its string column `field`."""
    import pyarrow.parquet as parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise DataError(f"{path}: {no_field(key, field, names)}")
            _once(field, names, str(path))
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(batch.schema.get_field_index(field)):
                    yield as_chunk(value.as_py(), field, f"{path}: row {number}")
                    number += 1
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: row {number}: field {field!r} is not UTF-8: {error.reason}") from error
    except Exception as error:  # damaged metadata ends in exceptions of any kind
        raise not_parquet(path, error) from error


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


def _once(field: str, names: list[str], place: str) -> None:
    if (times := names.count(field)) > 1:
        raise DataError(f"{place}: has {times} fields named {field!r}: rename all but one")


def no_field(key: str, field: str, names: list[str]) -> str:
    """The message for a row or table without `field`."""
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

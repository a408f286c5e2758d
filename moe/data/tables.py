"""Whole rows of JSONL, CSV, TSV, Parquet and data sets: every column, or what is wrong with the row, so that one can go
on behind it. A fault that leaves the rest of a file unreadable raises DataError."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe.data.readers import DataError, first_line
from moe.data.rows import csv_lines, json_array, kind_of, open_parquet, other_delimiter, wrong_width
from moe.errors import shown

PARQUET_ROWS = 256  # read at once
MOST_DIGITS = 4000  # of a whole number; Python refuses to read more than 4,300
DEEPEST = 64  # levels of a row's lists and objects; a conversation has 3, its tools' schemas about 10


@dataclass(slots=True)
class TableRow:
    """One row of a table: `values` by column. Where it can't be read, `problem` is the reason, and there are none."""

    place: str  # file:line, or file: row N (from 0)
    values: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    hint: str = ""  # what a missing column may come from


def dataset_rows(rows: Any, place: str) -> Iterator[TableRow]:
    """Every row of a `datasets` table."""
    try:
        for number, row in enumerate(rows):
            yield TableRow(f"{place}: row {number}", row)
    except DataError:
        raise
    except Exception as error:  # `datasets` lets any exception of its readers through
        raise DataError(f"{place}: `datasets` can't read it: {first_line(error)}") from error


def json_rows(lines: Iterator[tuple[int, int, bytes]], path: Path) -> Iterator[TableRow]:
    """A row for each line of JSON that isn't blank; `lines` are (number, position in the file, line)."""
    for number, _, line in lines:
        if line.isspace():
            continue
        place = f"{path}:{number}"
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
            if line.lstrip().startswith(b"["):
                raise json_array(path, number)
        yield _json_row(place, line.rstrip(b"\r\n"))


def _json_row(place: str, line: bytes) -> TableRow:
    try:
        row = _READ(line.decode(json.detect_encoding(line), "surrogatepass"))
    except json.JSONDecodeError as error:
        return TableRow(
            place, problem=f"broken JSON at column {error.colno}: {error.msg}: each line must be one JSON object"
        )
    except UnicodeDecodeError as error:
        return TableRow(
            place, problem=f"byte {error.start} of the line (0x{line[error.start]:02x}) is not UTF-8: {error.reason}"
        )
    except RecursionError:
        return TableRow(place, problem="broken JSON: nested too deeply")
    except _TwiceError as error:
        return TableRow(place, problem=f"has two fields named {shown(str(error))!r}: keep one")
    if not isinstance(row, dict):
        return TableRow(place, problem=f"must be a JSON object, is {kind_of(row)}")
    if line.count(b"[") + line.count(b"{") > DEEPEST and too_deep(row):
        return TableRow(place, problem=f"nested more than {DEEPEST} levels deep")
    return TableRow(place, row)


class _TwiceError(Exception):
    """A JSON object has a key twice."""


def _number(text: str) -> int | float:
    return int(text) if len(text) <= MOST_DIGITS else float(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return found


_READ = json.JSONDecoder(parse_int=_number, object_pairs_hook=_once).decode


def too_deep(value: Any) -> bool:
    """Whether a list or an object has more than DEEPEST levels."""
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [one for values in inner for one in values if isinstance(one, dict | list)]
        if not level:
            return False
    return True


def _each_once(names: list[str], place: str) -> None:
    """Raises DataError for columns of one name."""
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{place}: has {names.count(twice)} fields named {shown(twice)!r}: rename all but one")


def csv_rows(path: Path, delimiter: str) -> Iterator[TableRow]:
    """Every row below the header. Raises DataError where the rest of the file can't be read."""
    rows = csv_lines(path, delimiter)
    place, header = next(rows, ("", []))
    _each_once(header, place)
    hint = other_delimiter(header, delimiter)
    for place, row in rows:
        if len(row) == len(header):
            yield TableRow(place, dict(zip(header, row, strict=True)), hint=hint)
        else:
            yield TableRow(place, problem=wrong_width(row, header, delimiter))


def parquet_rows(path: Path, groups: list[int], first: int) -> Iterator[TableRow]:
    """The rows of some row groups of a Parquet file; the first one has the number `first`."""
    number = first
    try:
        with open_parquet(path) as file:
            _each_once(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, row_groups=groups):
                for values in batch.to_pylist():
                    yield TableRow(f"{path}: row {number}", values)
                    number += 1
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: row {number} or one behind it is not UTF-8: {error.reason}") from error

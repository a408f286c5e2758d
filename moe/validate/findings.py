"""One pass over the rows: what is wrong with which, how long they are, and what is learnt from them.

Memory is about 20 bytes per row, plus the problems.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe.config.validate import ValidateConfig
from moe.data.bins import Bins
from moe.data.readers import DataError
from moe.data.record_encoding import EncodedRow, Recipe, in_batches
from moe.data.records import DataRecord, Shape, parse
from moe.data.sources import Source
from moe.data.survey import hash_of
from moe.data.tables import TableRow
from moe.plan.run import Plan

NEAR_EMPTY = 2  # targets: a token and the end of the turn
NAMED = 5  # places of duplicates and near-empty rows


class _Places:
    """Places of rows by number, in a few bytes each: FILE: and a line number."""

    def __init__(self) -> None:
        self._prefixes: list[tuple[int, str]] = []
        self._lines = array("Q")

    def add(self, place: str) -> None:
        found = re.fullmatch(r"(.*?)(\d{1,18})", place, re.DOTALL)
        prefix, line = (found[1], int(found[2])) if found else (place, 0)
        if not self._prefixes or self._prefixes[-1][1] != prefix:
            self._prefixes.append((len(self._lines), prefix))
        self._lines.append(line)

    def __getitem__(self, number: int) -> str:
        prefix = next(prefix for start, prefix in reversed(self._prefixes) if start <= number)
        return f"{prefix}{self._lines[number]}"


@dataclass(slots=True)
class Findings:
    """About one source. `problems` are lines with place and reason, in the order of the rows."""

    name: str
    description: str
    kind: str = ""
    rows: int = 0
    problems: list[str] = field(default_factory=list)
    lengths: array[int] = field(default_factory=lambda: array("L"))
    targets: array[int] = field(default_factory=lambda: array("L"))
    hashes: array[int] = field(default_factory=lambda: array("Q"))
    places: _Places = field(default_factory=_Places)
    long: Counter[str] = field(default_factory=Counter)  # what happened to long rows, as `Recipe.fit` counts it
    sequences: dict[str, int] = field(default_factory=lambda: {"train": 0, "held_out": 0})
    filled: int = 0  # tokens of rows in the sequences
    samples: list[tuple[str, EncodedRow]] = field(default_factory=list)

    @property
    def good(self) -> int:
        return len(self.lengths)

    def duplicates(self) -> tuple[int, list[str]]:
        """How many rows are copies of an earlier one, and the places of the first."""
        hashes = np.asarray(self.hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")
        copies = np.sort(order[1:][hashes[order][1:] == hashes[order][:-1]])
        return len(copies), [self.places[int(number)] for number in copies[:NAMED]]

    def near_empty(self) -> tuple[int, list[str]]:
        """How many rows have at most NEAR_EMPTY targets, and the places of the first."""
        numbers = np.flatnonzero(np.asarray(self.targets) <= NEAR_EMPTY)
        return len(numbers), [self.places[int(number)] for number in numbers[:NAMED]]


@dataclass(frozen=True, slots=True)
class Validation:
    """What was found in every source, and what a run with these rows takes."""

    config: ValidateConfig
    recipe: Recipe
    findings: list[Findings]
    plan: Plan
    seconds: float

    @property
    def problems(self) -> list[str]:
        return [problem for found in self.findings for problem in found.problems]

    @property
    def rows(self) -> int:
        return sum(found.rows for found in self.findings)


def examine(
    source: Source, recipe: Recipe, held_out: float, samples: int, keep: Callable[[str], Any] | None = None
) -> Findings:
    """Reads a source whose `tables` are known. `keep` gets each good row as a line of JSON, in which values that JSON
    doesn't have (times, bytes, decimals) are written as Python's `str` of them."""
    found = Findings(source.name, source.description)
    counted = {split: Bins(recipe.sequence_length, _counter(found, split)) for split in found.sequences}
    for batch in in_batches(good_rows(source, found), lambda pair: pair[1]):
        segments, records = [], []
        for row, record in batch:
            try:
                segments.append(recipe.segments(record))
                records.append((row, record))
            except DataError as error:
                found.problems.append(str(error))
        for (row, record), encoded in zip(records, recipe.encode_each(segments), strict=True):
            if isinstance(encoded, DataError):
                found.problems.append(f"{row.place}: {encoded}")
                continue
            number = hash_of(record)
            found.places.add(row.place)
            found.hashes.append(number)
            found.lengths.append(len(encoded.ids_T))
            found.targets.append(int(encoded.targets_T.sum()))
            if len(found.samples) < samples:
                found.samples.append((row.place, encoded))
            split = "held_out" if number < int(held_out * 2**64) else "train"
            for part in recipe.fit(encoded, found.long):
                counted[split].add(part)
            if keep is not None:
                keep(_line(row))
    for one in counted.values():
        one.close()
    return found


def _line(row: TableRow) -> str:
    line = json.dumps(row.values, ensure_ascii=False, default=str)
    lone = re.search("[\ud800-\udfff]", line)  # half of a surrogate pair, in a column that isn't used
    return json.dumps(row.values, default=str) if lone else line


def _counter(found: Findings, split: str) -> Callable[[list[EncodedRow]], None]:
    def count(rows: list[EncodedRow]) -> None:
        found.sequences[split] += 1
        found.filled += sum(len(row.ids_T) for row in rows)

    return count


def good_rows(source: Source, found: Findings) -> Iterator[tuple[TableRow, DataRecord]]:
    """The good rows; `found` gets the others' problems. A file that can't be read on is left at its first such row."""
    shape: Shape | None = None
    assert source.tables is not None
    assert source.shape_of is not None
    for tables in source.tables():
        try:
            for row in (row for table in tables for row in table.rows()):
                found.rows += 1
                try:
                    if shape is None and not row.problem:
                        shape = source.shape_of(row)
                        found.kind = shape.kind.name
                    if shape is None:
                        raise DataError(f"{row.place}: {row.problem}")
                    yield row, parse(row, shape)
                except DataError as error:
                    found.problems.append(str(error))
        except DataError as error:
            found.rows += 1
            found.problems.append(f"{error} (the rest of the file isn't read)")

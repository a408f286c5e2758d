"""Questions and their SQL: training rows with exchanged values and columns, and held-out rows.

    python -m data.examples.sql_rows wikisql_train.jsonl FOLDER   # train.jsonl, held_out.jsonl, held_out.txt

Training has each row once as it is, then with other values and columns in question and query alike, which teaches to
copy what the question says rather than to remember it. They come from training rows only: values from conditions on
the same column, columns from any query.
"""

from __future__ import annotations

import random
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.examples.score import write_prompts
from data.examples.splits import Row, asked, read_rows, split, write_rows
from data.examples.sql import Query, parse

HELD_OUT = 0.1  # of the questions
COPIES = 8  # of each training row, the row itself included
COLUMNS = 0.5  # of the copies get other columns too
SEED = 0
Pool = dict[tuple[str, bool], list[str]]


def values_by_column(rows: Sequence[Row]) -> Pool:
    """What conditions compare a column with, by (column, whether the value has a letter); sorted, each once."""
    found: dict[tuple[str, bool], set[str]] = defaultdict(set)
    for row in rows:
        for condition in parse(row["completion"]).conditions:
            found[_kind(condition.column, condition.value)].add(condition.value)
    return {key: sorted(values) for key, values in found.items()}


def exchanged(row: Row, pool: Pool, names: Sequence[str], generator: random.Random) -> Row:
    """The row with values from `pool` and, for a share of COLUMNS, columns from `names` in the place of those that
    stand in the question exactly once; the row itself where none does."""
    question, query = row["prompt"], parse(row["completion"])
    if generator.random() < COLUMNS:
        question, query = with_other_columns(question, query, names, generator)
    conditions = list(query.conditions)
    for number, condition in enumerate(conditions):
        value = condition.value
        if _occurrences(value, question) != 1:
            continue
        other = generator.choice(pool.get(_kind(condition.column, value), [value]))
        if other == value:
            other = re.sub(r"\d", lambda _: str(generator.randrange(1, 10)), value)
        question = _replaced(question, value, other)
        conditions[number] = replace(condition, value=other)
    return {"prompt": question, "completion": str(Query(query.aggregate, query.column, tuple(conditions)))}


def with_other_columns(
    question: str, query: Query, names: Sequence[str], generator: random.Random
) -> tuple[str, Query]:
    """Question and query with another of `names` for each column that the question has exactly once, in any case, and
    outside the values. Where the question has it in small letters, it gets the other one in small letters."""
    others: dict[str, str] = {}
    for column in dict.fromkeys(query.columns):
        pattern = re.compile(_whole(column), re.IGNORECASE)
        found = pattern.findall(question)
        if len(found) != 1 or any(pattern.search(one.value) for one in query.conditions):
            continue
        others[column] = generator.choice(names)
        written = others[column].lower() if found[0] == column.lower() else others[column]
        question = pattern.sub(lambda _, text=written: text, question)
    changed = Query(
        query.aggregate,
        others.get(query.column, query.column),
        tuple(replace(one, column=others.get(one.column, one.column)) for one in query.conditions),
    )
    return question, changed


def columns(rows: Sequence[Row]) -> list[str]:
    """Every column of the rows' queries; sorted, each once."""
    return sorted({name for row in rows for name in parse(row["completion"]).columns})


def training_rows(rows: Sequence[Row], copies: int, seed: int) -> list[Row]:
    """`copies` of every row: as it is, then with exchanged values and columns; in random order."""
    pool, generator = values_by_column(rows), random.Random(seed)
    names = columns(rows)
    made = [row if copy == 0 else exchanged(row, pool, names, generator) for copy in range(copies) for row in rows]
    generator.shuffle(made)
    return made


def _kind(column: str, value: str) -> tuple[str, bool]:
    return column.casefold(), bool(re.search(r"[^\W\d_]", value))


def _whole(value: str) -> str:
    return rf"(?<!\w){re.escape(value)}(?!\w)"


def _occurrences(value: str, question: str) -> int:
    return len(re.findall(_whole(value), question))


def _replaced(question: str, value: str, other: str) -> str:
    return re.sub(_whole(value), lambda _: other, question)


def main(source: Path, folder: Path) -> None:
    train, held_out = split(read_rows(source), HELD_OUT)
    held = {asked(row) for row in held_out}
    made = [row for row in training_rows(train, COPIES, SEED) if asked(row) not in held]
    write_rows(folder / "train.jsonl", made)
    write_rows(folder / "held_out.jsonl", held_out)
    write_prompts(folder / "held_out.txt", held_out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

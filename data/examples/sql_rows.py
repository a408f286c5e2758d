"""Questions and their SQL: training rows with exchanged values, and held-out rows.

    python -m data.examples.sql_rows wikisql_train.jsonl FOLDER   # train, train_again, held_out .jsonl, held_out.txt

Each training file has a row once as it is and then with other values in its question and its query alike, which teaches
to copy a value rather than to remember it. Values come from the training side only, from conditions on the same column.
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
COPIES = 4  # of each training row in each round, the row itself included
ROUNDS = ("train", "train_again")  # files; each has other exchanged values
Pool = dict[tuple[str, bool], list[str]]


def values_by_column(rows: Sequence[Row]) -> Pool:
    """What conditions compare a column with, by (column, whether the value has a letter); sorted, each once."""
    found: dict[tuple[str, bool], set[str]] = defaultdict(set)
    for row in rows:
        for condition in parse(row["completion"]).conditions:
            found[_kind(condition.column, condition.value)].add(condition.value)
    return {key: sorted(values) for key, values in found.items()}


def exchanged(row: Row, pool: Pool, generator: random.Random) -> Row:
    """The row with other values, where a value stands in the question exactly once; the row itself where none does."""
    question, query = row["prompt"], parse(row["completion"])
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


def training_rows(rows: Sequence[Row], copies: int, seed: int) -> list[Row]:
    """`copies` of every row: as it is, then with exchanged values; in random order."""
    pool, generator = values_by_column(rows), random.Random(seed)
    made = [row if copy == 0 else exchanged(row, pool, generator) for copy in range(copies) for row in rows]
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
    for seed, name in enumerate(ROUNDS):
        made = training_rows(train, COPIES, seed)
        write_rows(folder / f"{name}.jsonl", [row for row in made if asked(row) not in held])
    write_rows(folder / "held_out.jsonl", held_out)
    write_prompts(folder / "held_out.txt", held_out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

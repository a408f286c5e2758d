"""The SQL dialect of the question-to-SQL rows, and a strict parser of it.

    query     = "SELECT " [aggregate " "] column " FROM table" [" WHERE " condition {" AND " condition}]
    condition = column " " operator " " value;   operator = "=" | ">" | "<";   aggregate = MAX | MIN | COUNT | SUM | AVG

Columns and values stand without quotes. A condition's column ends at the first operator between spaces, its value at
the next " AND " or at the end; so a text has one reading at most.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

AGGREGATES = ("MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<")


class NotSQL(ValueError):
    """A text outside the dialect; the message says where."""


@dataclass(frozen=True, slots=True)
class Condition:
    column: str
    operator: str
    value: str

    def __str__(self) -> str:
        return f"{self.column} {self.operator} {self.value}"


@dataclass(frozen=True, slots=True)
class Query:
    aggregate: str | None
    column: str
    conditions: tuple[Condition, ...] = ()

    def __str__(self) -> str:
        head = f"SELECT {self.aggregate + ' ' if self.aggregate else ''}{self.column} FROM table"
        return head + (" WHERE " + " AND ".join(map(str, self.conditions)) if self.conditions else "")

    @property
    def columns(self) -> list[str]:
        return [self.column, *(one.column for one in self.conditions)]


def parse(text: str) -> Query:
    """Raises NotSQL."""
    parser = _Parser(text)
    return parser.query()


class _Parser:
    def __init__(self, text: str) -> None:
        self.rest = text

    def query(self) -> Query:
        self._word("SELECT ")
        aggregate = next((one for one in AGGREGATES if self.rest.startswith(f"{one} ")), None)
        if aggregate is not None:
            self._word(f"{aggregate} ")
        column = self._name(self._until(" FROM table"), "the selected column")
        if not self.rest:
            return Query(aggregate, column)
        self._word(" WHERE ")
        conditions = [self._condition()]
        while self.rest:
            self._word(" AND ")
            conditions.append(self._condition())
        return Query(aggregate, column, tuple(conditions))

    def _condition(self) -> Condition:
        found = re.search(rf" ([{''.join(OPERATORS)}]) ", self.rest)
        if found is None:
            raise NotSQL(f"no operator between spaces in {self.rest!r}")
        column, operator = self._name(self.rest[: found.start()], "a condition's column"), found[1]
        self.rest = self.rest[found.end() :]
        value, found_and, after = self.rest.partition(" AND ")
        self.rest = found_and + after
        self._name(value, "a value")
        return Condition(column, operator, value)

    def _until(self, word: str) -> str:
        before, found, after = self.rest.partition(word)
        if not found:
            raise NotSQL(f"no {word.strip()!r} in {self.rest!r}")
        self.rest = found + after
        self._word(word)
        return before

    def _word(self, word: str) -> None:
        if not self.rest.startswith(word):
            raise NotSQL(f"{word!r} expected at {self.rest!r}")
        self.rest = self.rest[len(word) :]

    @staticmethod
    def _name(text: str, what: str) -> str:
        if not text.strip() or text != text.strip() or any(letter < " " for letter in text):
            raise NotSQL(f"{what} is {text!r}: empty, between spaces, or with control characters")
        return text

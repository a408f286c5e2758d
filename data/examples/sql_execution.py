"""Queries in SQLite, and whether two of them give the same on made tables.

The rows come without tables, and a real table would say little: nearly every wrong condition selects nothing there. A
made table has the columns of both queries, and rows around every value that either compares with: equal, above, below,
other, missing. So queries that differ give different results, whatever table they were written for.
"""

from __future__ import annotations

import hashlib
import random
import re
import sqlite3
from collections import defaultdict
from contextlib import closing
from decimal import Decimal, InvalidOperation

from data.examples.sql import Query

TABLES = 16  # that two queries must agree on
ROWS = 48  # of a made table
Value = str | int | float | None
Table = dict[str, list[Value]]  # column → values, equally many


def to_sqlite(query: Query) -> str:
    """The query with quoted names and literals, as SQLite reads it. Comparisons with a number are numeric."""
    column = _quoted(query.column)
    text = f"SELECT {f'{query.aggregate}({column})' if query.aggregate else column} FROM {_quoted('table')}"
    conditions = [f"{_quoted(one.column)} {one.operator} {_literal(one.value)}" for one in query.conditions]
    return text + (f" WHERE {' AND '.join(conditions)}" if conditions else "")


def columns_of(*queries: Query) -> list[str]:
    """Every column once. Names that differ in case only are one column, as for SQLite."""
    return list({name.casefold(): name for query in queries for name in query.columns}.values())


def is_prepared(query: Query) -> bool:
    """Whether SQLite compiles the query, for a table with its columns."""
    try:
        _results(query, {name: [] for name in columns_of(query)})
    except sqlite3.Error:
        return False
    return True


def same_results(expected: Query, found: Query) -> bool:
    """Whether both give the same rows, in any order, on `TABLES` made tables. False if SQLite refuses one."""
    tables = (made_table(expected, found, number) for number in range(TABLES))
    try:
        return all(_results(expected, table) == _results(found, table) for table in tables)
    except sqlite3.Error:
        return False


def made_table(first: Query, second: Query, number: int) -> Table:
    """Table `number` for two queries: a function of the two as a set and of the number, nothing else.

    Half of the rows satisfy all conditions of one of the queries, but for one column; the others are drawn at random.
    """
    names = sorted(columns_of(first, second), key=str.casefold)
    pair = sorted((str(first), str(second)))
    seed = hashlib.sha256("\n".join([*pair, str(number)]).encode()).digest()
    generator = random.Random(int.from_bytes(seed[:8], "big"))
    choices: dict[str, list[Value]] = defaultdict(list)
    for condition in (*first.conditions, *second.conditions):
        choices[condition.column.casefold()] += _around(condition.value)
    table: Table = {name: [] for name in names}
    for row in range(ROWS):
        near = (first, second)[row % 2] if row < ROWS // 2 else None
        free = generator.choice(names)
        met = {one.column.casefold(): one for one in near.conditions} if near else {}
        for name in names:
            condition = met.get(name.casefold())
            if condition is not None and name != free:
                table[name].append(_satisfying(condition.operator, condition.value))
            elif choices[name.casefold()]:
                table[name].append(generator.choice(choices[name.casefold()]))
            else:
                table[name].append(None if generator.random() < 0.1 else generator.randrange(10**9))
    return table


def _around(value: str) -> list[Value]:
    """Values for a column that is compared with this one: equal, below, above, other, missing."""
    number = _number(value)
    if number is None:
        return [value, value, value + " ", "a", "zz", None]
    unit = 10.0 ** -len(value.partition(".")[2])  # of the last digit; 1 for a whole number
    return [number, number, number - unit, number + unit, -(10**9), 10**9, None]


def _satisfying(operator: str, value: str) -> Value:
    number = _number(value)
    if number is None:
        return {"=": value, ">": value + " ", "<": ""}[operator]
    return number + {"=": 0, ">": 1, "<": -1}[operator]


def _results(query: Query, table: Table) -> list[tuple[Value, ...]]:
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE {} ({})".format(_quoted("table"), ", ".join(map(_quoted, table))))
        marks = ", ".join("?" * len(table))
        database.executemany(f"INSERT INTO {_quoted('table')} VALUES ({marks})", zip(*table.values(), strict=True))
        return sorted(database.execute(to_sqlite(query)).fetchall(), key=repr)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(value: str) -> str:
    number = _number(value)
    return repr(number) if number is not None else "'" + value.replace("'", "''") + "'"


def _number(value: str) -> int | float | None:
    """The number that the text writes plainly (no separators, no exponent), within float64's exact integers."""
    if not re.fullmatch(r"[+-]?(\d+(\.\d+)?|\.\d+)", value, re.ASCII):
        return None
    try:
        exact = Decimal(value)
    except InvalidOperation:
        return None
    if abs(exact) > 2**53:
        return None
    return int(exact) if "." not in value else float(exact)

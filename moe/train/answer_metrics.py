"""What is measured of an answer. An answer, and the text expected, are what stands before the token that ends them,
without the white space around them. Each metric is 0 or 1 for an answer, and their mean is the evaluation's.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable

from moe.config import AnswerMetric

LONGEST_SQL = 1_000_000  # bytes
ALLOWED = {  # what a statement may do, of SQLite's authorizer codes; PRAGMA and ATTACH would act while it is prepared
    getattr(sqlite3, f"SQLITE_{name}")
    for name in (
        "SELECT", "READ", "FUNCTION", "RECURSIVE", "INSERT", "UPDATE", "DELETE", "TRANSACTION", "CREATE_TABLE",
        "CREATE_TEMP_TABLE", "CREATE_INDEX", "CREATE_VIEW", "CREATE_TRIGGER", "DROP_TABLE", "DROP_INDEX", "DROP_VIEW",
        "ALTER_TABLE", "REINDEX",
    )
}  # fmt: skip


def exact_match(answer: str, expected: str) -> bool:
    """The answer is the expected text, character for character."""
    return answer == expected


def json_valid(answer: str, expected: str) -> bool:
    """The answer is one JSON value (RFC 8259: NaN and Infinity are none)."""
    try:
        json.loads(answer, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(name: str) -> None:
    raise ValueError(name)


def sql_valid(answer: str, expected: str) -> bool:
    """The answer is one SQL statement that SQLite can prepare, whatever tables, columns and functions there are: that
    it has no such thing is no fault. Comments may follow its semicolon. It is never executed."""
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, LONGEST_SQL)
        database.set_authorizer(lambda code, *_: sqlite3.SQLITE_OK if code in ALLOWED else sqlite3.SQLITE_DENY)
        try:
            if _more_follows(answer):  # SQLite may stop before it, at a name that there isn't
                return False
            database.execute(f"EXPLAIN QUERY PLAN {answer}")
        except sqlite3.OperationalError as error:
            return str(error).startswith("no such")
        except (sqlite3.Error, sqlite3.Warning, ValueError):  # several statements, a null character, half a character
            return False
    return True


def _more_follows(text: str) -> bool:
    """Whether there is anything but comments behind the semicolon that ends the first statement. Raises ValueError."""
    ends = (at + 1 for at, sign in enumerate(text) if sign == ";" and sqlite3.complete_statement(text[: at + 1]))
    rest = text[next(ends, len(text)) :].replace(";", " x")  # a second semicolon is one too many
    return not sqlite3.complete_statement(f";{rest}")


METRICS: dict[AnswerMetric, Callable[[str, str], bool]] = {
    AnswerMetric.exact_match: exact_match,
    AnswerMetric.json_valid: json_valid,
    AnswerMetric.sql_valid: sql_valid,
}

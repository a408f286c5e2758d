"""What counts as an exact match, as JSON and as SQL, by hand."""

from __future__ import annotations

import pytest

from moe.config import AnswerMetric
from moe.train.answer_metrics import METRICS, exact_match, json_valid, sql_valid


def test_every_metric_has_its_definition() -> None:
    assert METRICS.keys() == set(AnswerMetric)
    assert all(METRICS[metric].__name__ == metric.name for metric in AnswerMetric)


def test_exact_match() -> None:
    assert exact_match("12", "12")
    assert not exact_match("12", "1")
    assert not exact_match("a  b", "a b")
    assert not exact_match("A", "a")


@pytest.mark.parametrize("text", ['{"a": [1, 2.5, null]}', "3", '"x"', "[]"])
def test_json(text: str) -> None:
    assert json_valid(text, "")


@pytest.mark.parametrize(
    "text", ["", "{a: 1}", "{'a': 1}", '{"a": 1} and more', "NaN", "[Infinity]", "[1,", "[" * 10**5]
)
def test_what_is_no_json(text: str) -> None:
    assert not json_valid(text, "")


@pytest.mark.parametrize(
    "text",
    [
        "SELECT name FROM players WHERE position = 'Guard' AND age > 3",
        "select count(*) from t;",
        "SELECT nosuch(a) FROM t JOIN u ON t.id = u.id GROUP BY b HAVING max(c) > 1",
        "INSERT INTO t VALUES (1, 'a')",
        "CREATE TABLE t (a INTEGER PRIMARY KEY, b TEXT)",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 9) SELECT i FROM n",
        "SELECT 1 -- one",
        "SELECT a FROM t; -- all; of them",
        "SELECT a FROM t WHERE b = 'x; y' /* ; */;",
        'SELECT "a;b" FROM t',
        "CREATE TRIGGER r AFTER INSERT ON t BEGIN DELETE FROM u; SELECT 1; END;",
    ],
)
def test_sql(text: str) -> None:
    assert sql_valid(text, "")


@pytest.mark.parametrize(
    "text",
    [
        "", ";", "-- nothing", "SELECT", "SELECT a FROM", "SELECT a FROM t WHERE", "SELECT a b c FROM t", "hello",
        "SELECT (1", "SELECT 1; SELECT 2", "SELECT 'open", "SELECT a FROM t)", "SELECT \0 1", "SELECT \ud800",
        "QUERY PLAN SELECT 1", "EXPLAIN SELECT 1", "ATTACH '/tmp/x' AS y", "PRAGMA user_version = 3",
        "SELECT " + "(" * 10**4, "SELECT a FROM t; this is garbage", "SELECT a FROM t; DROP TABLE t;",
        "SELECT a FROM t;;", "SELECT a FROM t; \ud800", "SELECT a FROM t; \0", "/**/ QUERY PLAN SELECT 1",
        "-- one\nEXPLAIN SELECT 1",
    ],
)  # fmt: skip
def test_what_is_no_sql(text: str) -> None:
    assert not sql_valid(text, "")

"""The SQL dialect's parser, execution on made tables, and exchanged values."""

from __future__ import annotations

import random
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from data.examples.splits import Row, asked, read_rows, write_rows
from data.examples.sql import AGGREGATES, Condition, NotSQL, Query, parse
from data.examples.sql_execution import columns_of, is_prepared, made_table, same_results, to_sqlite
from data.examples.sql_rows import (
    COPIES,
    columns,
    exchanged,
    main,
    training_rows,
    values_by_column,
    with_other_columns,
)

TEXTS = {
    "SELECT Round FROM table": Query(None, "Round"),
    "SELECT COUNT School/Club Team FROM table WHERE Player = Jalen Rose": Query(
        "COUNT", "School/Club Team", (Condition("Player", "=", "Jalen Rose"),)
    ),
    "SELECT SUM Goals FROM table WHERE Rank < 10 AND Name = nicolas anelka AND Apps > 9": Query(
        "SUM", "Goals",
        (Condition("Rank", "<", "10"), Condition("Name", "=", "nicolas anelka"), Condition("Apps", ">", "9")),
    ),
    'SELECT Class FROM table WHERE "Muddy" voice = ᅇ, ㆅ': Query(
        None, "Class", (Condition('"Muddy" voice', "=", "ᅇ, ㆅ"),)
    ),
    "SELECT To par FROM table WHERE Score = 71-74-72-72=289": Query(
        None, "To par", (Condition("Score", "=", "71-74-72-72=289"),)
    ),
    "SELECT Men's singles FROM table WHERE It's = O'Neill; DROP TABLE x": Query(
        None, "Men's singles", (Condition("It's", "=", "O'Neill; DROP TABLE x"),)
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_query_is_read_and_written_as_it_was(text: str) -> None:
    assert parse(text) == TEXTS[text]
    assert str(TEXTS[text]) == text
    assert is_prepared(TEXTS[text])


@pytest.mark.parametrize(
    "text",
    [
        "", "SELECT", "SELECT  FROM table", "select Round FROM table", "SELECT Round FROM tables", "SELECT Round FROM",
        "SELECT Round FROM table ", "SELECT Round FROM table WHERE ", "SELECT Round FROM table WHERE Circuit",
        "SELECT Round FROM table WHERE Circuit = ", "SELECT Round FROM table WHERE  = Assen", "SELECT MAX  FROM table",
        "SELECT COUNT FROM table",
        "SELECT Round FROM table WHERE Circuit == Assen", "SELECT Round FROM table WHERE A = 1 AND ",
        "SELECT Round FROM table WHERE A = 1 AND B", "SELECT Round FROM table WHERE A = rock AND roll",
        "SELECT Round FROM table WHERE A = 1  AND B = 2", "SELECT Round\n FROM table", "SELECT MAX Round FROM table;",
        " SELECT Round FROM table", "SELECT Round FROM table WHERE A = 1\x00",
    ],
)  # fmt: skip
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(NotSQL):
        parse(text)


def test_sqlite_gets_quoted_names_and_literals() -> None:
    query = parse(
        """SELECT MAX Men's "x" FROM table WHERE Name = O'Neill AND Year > 1995 AND Share < 0.5 AND Code = 1e9"""
    )
    name = '"Men\'s ""x"""'
    assert to_sqlite(query) == (
        f"""SELECT MAX({name}) FROM "table" WHERE "Name" = 'O''Neill' AND "Year" > 1995 AND "Share" < 0.5 """
        """AND "Code" = '1e9'"""
    )
    with sqlite3.connect(":memory:") as database:
        database.execute(f'CREATE TABLE "table" ({name}, "Name", "Year", "Share", "Code")')
        database.execute("""INSERT INTO "table" VALUES (3, 'O''Neill', 1996, 0.25, '1e9')""")
        assert database.execute(to_sqlite(query)).fetchall() == [(3,)]


def _mutated(query: Query) -> list[Query]:
    """What a model might write in its place, all of which select something else."""
    found = [replace(query, column="Other")]
    found += [replace(query, aggregate=one) for one in (None, *AGGREGATES) if one != query.aggregate]
    for number, one in enumerate(query.conditions):
        rest = list(query.conditions)
        for other in (
            replace(one, operator={"=": ">", ">": "<", "<": "="}[one.operator]),
            replace(one, value=one.value + "1"),
            replace(one, column="Other"),
        ):
            found.append(replace(query, conditions=(*rest[:number], other, *rest[number + 1 :])))
        found.append(replace(query, conditions=(*rest[:number], *rest[number + 1 :])))
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_results_are_the_same_for_the_same_query_only(text: str) -> None:
    query = parse(text)
    assert same_results(query, query)
    for other in _mutated(query):
        assert not same_results(query, other), other
        assert not same_results(other, query), other


def test_order_of_conditions_and_case_of_names_change_no_result() -> None:
    query = parse("SELECT Year Won FROM table WHERE Name = a AND Points > 3")
    assert same_results(query, parse("SELECT year won FROM table WHERE POINTS > 3 AND Name = a"))
    assert not same_results(query, parse("SELECT Year Won FROM table WHERE Name = A AND Points > 3"))
    assert same_results(query, parse("SELECT Year Won FROM table WHERE Name = a AND Points > 3.0"))


def test_a_made_table_is_a_function_of_the_two_queries() -> None:
    first, second = parse("SELECT A FROM table WHERE B > 3"), parse("SELECT C FROM table WHERE B = x")
    assert made_table(first, second, 0) == made_table(first, second, 0) != made_table(first, second, 1)
    assert columns_of(first, second) == ["A", "B", "C"]


ROWS: list[Row] = [
    {"prompt": "Who won in 1995 and 1996?", "completion": "SELECT Winner FROM table WHERE Year = 1995 AND Next = 1996"},
    {"prompt": "Who won in Assen (1990)?", "completion": "SELECT Winner FROM table WHERE Circuit = Assen (1990)"},
    {"prompt": "Who won in Misano?", "completion": "SELECT Winner FROM table WHERE Circuit = Misano"},
    {"prompt": "Is a 7 a 7?", "completion": "SELECT Winner FROM table WHERE Points = 7"},
    {"prompt": "The most wins?", "completion": "SELECT MAX Wins FROM table"},
]


def test_values_are_exchanged_in_question_and_query_alike() -> None:
    pool = values_by_column(ROWS)
    assert pool["circuit", True] == ["Assen (1990)", "Misano"]
    for seed in range(20):
        generator = random.Random(seed)
        for row in ROWS:
            made = exchanged(row, pool, ["Wins"], generator)
            query = parse(made["completion"])
            assert query.columns == parse(row["completion"]).columns
            assert all(one.value in made["prompt"] for one in query.conditions)
    assert exchanged(ROWS[3], pool, ["A"], random.Random(0)) == ROWS[3]  # its value stands in the question twice
    years = {exchanged(ROWS[0], pool, ["A"], random.Random(seed))["prompt"] for seed in range(5)}
    assert len(years) > 1


def test_columns_are_exchanged_in_question_and_query_alike() -> None:
    assert columns(ROWS) == ["Circuit", "Next", "Points", "Winner", "Wins", "Year"]
    for question, completion, expected in (
        ("The most wins?", "SELECT MAX Wins FROM table", "The most total score?"),
        ("The Wins of Rossi?", "SELECT Wins FROM table WHERE Name = Rossi", "The Total Score of Rossi?"),
        ("The wins of Wins?", "SELECT Wins FROM table", None),  # twice
        ("The points of No wins?", "SELECT Points FROM table WHERE Team = No wins", "The total score of No wins?"),
        ("The best of No wins?", "SELECT Wins FROM table WHERE Team = No wins", None),  # in a value
    ):
        query = parse(completion)
        made, changed = with_other_columns(question, query, ["Total Score"], random.Random(0))
        assert made == (expected or question)
        assert changed == (query if expected is None else replace(query, column="Total Score"))
    made, changed = with_other_columns(
        "Wins by year?", parse("SELECT Wins FROM table WHERE Year = 7 AND Year = 8"), ["A"], random.Random(0)
    )
    assert (made, str(changed)) == ("A by a?", "SELECT A FROM table WHERE A = 7 AND A = 8")
    rows = [exchanged(ROWS[4], {}, ["Losses"], random.Random(seed)) for seed in range(10)]
    assert {row["completion"] for row in rows} == {"SELECT MAX Wins FROM table", "SELECT MAX Losses FROM table"}


def test_the_sides_share_no_question_and_no_value_pool(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Who won race {number} in town{number % 40}?",
         "completion": f"SELECT Winner FROM table WHERE Race = {number} AND Town = town{number % 40}"}
        for number in range(400)
    ]  # fmt: skip
    write_rows(tmp_path / "rows.jsonl", [*rows, {**rows[0], "prompt": rows[0]["prompt"].upper()}])
    main(tmp_path / "rows.jsonl", tmp_path)
    train, held_out = read_rows(tmp_path / "train.jsonl"), read_rows(tmp_path / "held_out.jsonl")
    assert not {asked(row) for row in train} & {asked(row) for row in held_out}
    originals = [row for row in rows if asked(row) not in {asked(one) for one in held_out}]
    assert all(row in train for row in originals)
    assert len(train) <= COPIES * (len(originals) + 1)
    prompts = (tmp_path / "held_out.txt").read_text(encoding="utf-8").splitlines()
    assert prompts == [row["prompt"] for row in held_out]


def test_training_rows_depend_on_the_seed_alone() -> None:
    assert training_rows(ROWS, 3, seed=1) == training_rows(ROWS, 3, seed=1) != training_rows(ROWS, 3, seed=2)
    assert len(training_rows(ROWS, 3, seed=1)) == 15

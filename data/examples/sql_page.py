"""Scores the answers of launch/examples/sql.sh and writes its page.

python -m data.examples.sql_page FOLDER PAGE
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.examples.cost import time_bars
from data.examples.page import Bar, Page, Sample, Table, elapsed, percent, script_of
from data.examples.score import Scored, scored
from data.examples.splits import leaks, read_rows
from data.examples.sql import NotSQL, Query, parse
from data.examples.sql_execution import is_prepared, same_results
from data.examples.sql_rows import COPIES, HELD_OUT, columns
from data.examples.training import active_parameters, final_metrics, runs

PARSES = 0.99  # required
MOST_PASSES = 8  # over the training questions
MOST_MINUTES = 30
SHOWN = 8  # samples, right ones and wrong ones


@dataclass(frozen=True, slots=True)
class Judged:
    """What is right of one answer. `columns`: those of SELECT and of the conditions, in their order."""

    parses: bool = False
    exact: bool = False
    executes: bool = False
    aggregate: bool = False
    selected: bool = False
    columns: bool = False
    has_where: bool = False


TITLES = {
    "parses": "parses, here and in SQLite",
    "exact": "exact match",
    "executes": "execution match",
    "aggregate": "the same aggregate, or none",
    "selected": "the same selected column",
    "columns": "the same columns everywhere",
    "has_where": "conditions where there are some, none where there are none",
}


TRAINING: dict[str, Callable[[dict[str, Any]], str]] = {
    "steps": lambda metrics: f"{metrics['step']:,}",
    "tokens": lambda metrics: f"{metrics['tokens']:,}",
    "loss of the last step": lambda metrics: f"{metrics['lm_loss']:.3f}",
    "minutes, with whatever else the machine did": lambda metrics: f"{metrics['elapsed'] / 60:.1f}",
}


def judge(expected: str, answer: str) -> Judged:
    wanted = parse(expected)
    try:
        found = parse(answer)
    except NotSQL:
        return Judged()
    return Judged(
        parses=is_prepared(found),
        exact=answer == expected,
        executes=answer == expected or same_results(wanted, found),
        aggregate=found.aggregate == wanted.aggregate,
        selected=found.column == wanted.column,
        columns=found.columns == wanted.columns,
        has_where=bool(found.conditions) == bool(wanted.conditions),
    )


def is_knowable(query: Query, question: str, seen: set[str]) -> bool:
    """Whether each column was seen in training or stands in the question, and each value stands in the question. The
    prompt doesn't have the table's columns: other queries can't be written from it."""
    names = all(name in seen or name in question for name in query.columns)
    return names and all(one.value in question for one in query.conditions)


def page(folder: Path) -> Page:
    rows = read_rows(folder / "held_out.jsonl")
    train = read_rows(folder / "train.jsonl")
    queries = [parse(row["completion"]) for row in rows]
    seen = set(columns(train))
    knowable = [is_knowable(query, row["prompt"], seen) for query, row in zip(queries, rows, strict=True)]
    every = runs(folder, "seed_*")
    answers = [scored(folder / "held_out.jsonl", run / "held_out.jsonl") for run in every]
    judged = [[judge(one.expected, one.answer) for one in each.samples] for each in answers]
    last = [final_metrics(run) for run in every]

    def reached(name: str, chosen: Sequence[bool] | None = None) -> list[str]:
        """Of each seed, over the chosen rows."""
        kept = [[one for one, here in zip(each, chosen or [True] * len(rows), strict=True) if here] for each in judged]
        return [percent(sum(getattr(one, name) for one in each), len(each)) for each in kept]

    kinds = {
        "no condition": [not query.conditions for query in queries],
        "one condition": [len(query.conditions) == 1 for query in queries],
        "two or more conditions": [len(query.conditions) > 1 for query in queries],
        "can be known from question and training rows": knowable,
    }
    both = len(leaks(train, rows))
    parses = all(sum(one.parses for one in each) >= PARSES * len(each) for each in judged)
    seeds = len(every) > 1
    names = [run.name.replace("_", " ") for run in every]
    return Page(
        title="Questions to SQL",
        shows=f"""
A model of {active_parameters(every[0]) / 1e6:.1f} M parameters learns from scratch, tokenizer included, to answer
questions of WikiSQL with a query: {len(train) // COPIES:,} questions to train on, {len(rows):,} held out (the
hash of a question decides, {HELD_OUT:.0%}; no seed). Training sees each question {COPIES} times: once as it is, then
with other values and columns in question and query, taken from other training rows. All held-out rows are scored,
greedy, one answer each.

The prompt is the question alone, without the table's columns, so a name that the question words differently can only be
guessed: {percent(sum(knowable), len(knowable))} of the held-out queries have only columns that training rows have or
that stand in the question as they are, and only values that stand there. Nor does the question show whether the query
has a WHERE: {percent(sum(kinds["no condition"]), len(rows))} of these rows have none, most of them although their
question states a condition.
""",
        script=script_of("sql"),
        bars=[
            Bar(TITLES["parses"], f"≥ {PARSES:.0%}", " / ".join(reached("parses")), parses),
            Bar(TITLES["exact"], "stated, with seeds", " / ".join(reached("exact")), seeds),
            Bar(TITLES["executes"], "stated, with seeds", " / ".join(reached("executes")), seeds),
            Bar("questions on both sides of the split", "0", str(both), both == 0),
            Bar("passes over the training questions", f"≤ {MOST_PASSES}", str(COPIES), COPIES <= MOST_PASSES),
            *time_bars(folder, MOST_MINUTES),
        ],
        tables=[
            Table("By part of the query", ("right", *names), [(TITLES[one], *reached(one)) for one in TITLES], MEANING),
            Table(
                "Exact match by kind of row",
                ("expected query", "rows", *names),
                [(kind, f"{sum(chosen):,}", *reached("exact", chosen)) for kind, chosen in kinds.items()],
            ),
            Table(
                "Training",
                ("", *names),
                [(what, *(say(one) for one in last)) for what, say in TRAINING.items()],
            ),
        ],
        samples=_samples(answers[0], judged[0]),
        notes=NOTES,
        seconds=elapsed(folder),
    )  # fmt: skip


MEANING = """
An answer *parses* when data/examples/sql.py's grammar reads it and SQLite prepares it, with names and values quoted. It
*executes alike* when it gives the expected query's rows on each of 16 made tables that have both queries' columns and
rows around every value of both (data/examples/sql_execution.py); names that differ in case only are one column there.
"""
NOTES = "Samples are from WikiSQL (Salesforce, BSD-3-Clause). “Right” there means execution match."


def _samples(answers: Scored, judged: Sequence[Judged]) -> list[Sample]:
    """The first held-out rows whose answers execute alike, and the first others."""
    right = [replace(sample, right=one.executes) for sample, one in zip(answers.samples, judged, strict=True)]
    return Scored(right).shown(SHOWN)


if __name__ == "__main__":
    page(Path(sys.argv[1])).write(Path(sys.argv[2]))

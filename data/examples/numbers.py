"""Runs of whole numbers: a few are given, the model writes the rest, up to 50.

    python -m data.examples.numbers rows FOLDER   # train.jsonl, held_out.jsonl, starts.jsonl, tokenizer/
    python -m data.examples.numbers page FOLDER PAGE   # the page, from the answers in FOLDER

51 tokens: the numbers 1 to 50, and the end of a row.
"""

from __future__ import annotations

import random
from pathlib import Path

from data.examples.page import Bar, Page, Table, command_line, elapsed, percent, script_of
from data.examples.score import scored, write_prompts
from data.examples.splits import Row, leaks, split, write_rows
from data.examples.training import final_metrics, runs
from data.examples.vocabulary import write_tokenizer

LAST = 50
GIVEN = range(3, 11)  # numbers given
HELD_OUT = 0.2  # of the distinct rows
EPOCH = 1_000  # rows
SHOWN = ("1 2 3", "40 41 42")


def row(first: int, given: int) -> Row:
    """`given` numbers from `first` on, then all that follow: a text and its continuation, its first space included."""
    numbers = [f" {number}" for number in range(first, LAST + 1)]
    return {"prompt": "".join(numbers[:given]).strip(), "completion": "".join(numbers[given:])}


def all_rows() -> list[Row]:
    return [row(first, given) for first in range(1, LAST) for given in GIVEN if first + given <= LAST]


def starts() -> list[Row]:
    """Every starting point that three numbers can have before another one follows."""
    return [row(first, 3) for first in range(1, LAST - 2)]


def write(folder: Path) -> None:
    train, held_out = split(all_rows(), HELD_OUT)
    assert not leaks(train, held_out)
    write_rows(folder / "train.jsonl", random.Random(0).choices(train, k=EPOCH))
    for name, rows in (("held_out", held_out), ("starts", starts())):
        write_rows(folder / f"{name}.jsonl", rows)
        write_prompts(folder / f"{name}.txt", rows)
    write_tokenizer(folder / "tokenizer", [f" {number}" for number in range(1, LAST + 1)], r" \d+", before=" ")


def page(folder: Path) -> Page:
    rows, held, begun = [], [], []
    for run in runs(folder):
        held.append(scored(folder / "held_out.jsonl", run / "held_out.jsonl"))
        begun.append(scored(folder / "starts.jsonl", run / "starts.jsonl"))
        metrics = final_metrics(run)
        loss = f"{metrics['lm_loss']:.5f}"
        rows.append(
            (
                run.name,
                metrics["step"],
                loss,
                percent(held[-1].right, held[-1].of),
                percent(begun[-1].right, begun[-1].of),
            )
        )
    reached = [" / ".join(percent(one.right, one.of) for one in each) for each in (held, begun)]
    met = [all(one.right == one.of for one in each) for each in (held, begun)]
    shown = [sample for one in begun for sample in one.samples if sample.prompt in SHOWN]
    return Page(
        title="Number sequences",
        shows=f"""
A model with 51 tokens, 2 layers and hidden size 32 learns from rows of prompt and completion to continue counting. A
row gives 3 to 10 consecutive numbers; the completion is every number that follows, up to {LAST}. Training is 5 epochs
of {EPOCH:,} rows, drawn from the {1 - HELD_OUT:.0%} of all {len(all_rows())} distinct rows that the hash of their
prompt puts there; the others are held out. An answer counts as right only if all of it is right, its end included.""",
        script=script_of("numbers"),
        bars=[
            Bar("held-out rows, exact", "100 %", reached[0], met[0]),
            Bar(f"all {len(starts())} starting points, three numbers given", "100 %", reached[1], met[1]),
            Bar(
                "1 2 3 and 40 41 42 are continued",
                "yes",
                "yes" if all(one.is_right for one in shown) else "no",
                all(one.is_right for one in shown),
            ),
        ],
        tables=[
            Table("By seed", ("run", "steps", "training loss, last step", "held out", "starting points"), rows),
            Table("Continued", ("prompt", "answer"), [(one.prompt, one.answer.strip()) for one in shown[: len(SHOWN)]]),
        ],
        samples=held[0].shown(5),
        seconds=elapsed(folder),
    )


if __name__ == "__main__":
    command_line(__doc__, write, page)

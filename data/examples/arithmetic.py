"""a∘b for operands 1–20 and + − ×: 1,200 problems, of which some are held out.

    python -m data.examples.arithmetic rows FOLDER   # FOLDER/problems and FOLDER/pairs: rows, prompts, tokenizer
    python -m data.examples.arithmetic page FOLDER PAGE   # the page, from the answers in FOLDER

Two splits. `problems`: each problem by itself, so that the training rows may have 7*8 where 8*7 is held out. `pairs`:
the harder one, where sums and products of the same two numbers are on one side in both orders, and so are differences.
"""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

from data.examples.page import Bar, Page, Table, elapsed, percent, script_of
from data.examples.score import Scored, scored, write_prompts
from data.examples.splits import Key, Row, asked, leaks, split, write_rows
from data.examples.training import final_metrics, runs
from data.examples.vocabulary import write_tokenizer

OPERANDS = range(1, 21)
SIGNS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
HELD_OUT = 0.1  # of the distinct problems
EPOCH, EPOCHS = 10_000, 20  # rows
TOLD = {"problems": "each problem by itself", "pairs": "both orders of a pair together"}


def problems() -> list[Row]:
    """All 1,200, each once."""
    return [
        {"prompt": f"{a}{sign}{b}=", "completion": str(compute(a, b))}
        for sign, compute in SIGNS.items()
        for a in OPERANDS
        for b in OPERANDS
    ]


def pair(row: Row) -> str:
    """The sign and the two operands, the smaller one first."""
    a, sign, b = parts(row["prompt"])
    return f"{sign} {min(a, b)} {max(a, b)}"


def parts(prompt: str) -> tuple[int, str, int]:
    found = re.fullmatch(r"(\d+)([-+*])(\d+)=", prompt)
    assert found is not None, prompt
    return int(found[1]), found[2], int(found[3])


KEYS: dict[str, Key] = {"problems": asked, "pairs": pair}


def drawn(rows: list[Row], count: int, seed: int) -> list[Row]:
    """`count` rows: all of them as often as it goes, then a random part, in random order."""
    generator = random.Random(seed)
    whole, rest = divmod(count, len(rows))
    chosen = rows * whole + generator.sample(rows, rest)
    generator.shuffle(chosen)
    return chosen


def write(folder: Path) -> None:
    for name, key in KEYS.items():
        train, held_out = split(problems(), HELD_OUT, key)
        assert not leaks(train, held_out, key)
        write_rows(folder / name / "train.jsonl", drawn(train, EPOCH, seed=0))
        for side, rows in (("seen", train), ("held_out", held_out)):
            write_rows(folder / name / f"{side}.jsonl", rows)
            write_prompts(folder / name / f"{side}.txt", rows)
    write_tokenizer(folder / "tokenizer", "0123456789+-*=")


def by_sign(found: Scored) -> list[str]:
    return [
        percent(one.right, one.of)
        for sign in SIGNS
        for one in [found.only(lambda sample, sign=sign: parts(sample.prompt)[1] == sign)]
    ]


def page(folder: Path) -> Page:
    rows, found = [], {name: list[Scored]() for name in KEYS}
    for name, each in found.items():
        for run in runs(folder, f"{name}_*"):
            each.append(scored(folder / name / "held_out.jsonl", run / "held_out.jsonl"))
            seen = scored(folder / name / "seen.jsonl", run / "seen.jsonl")
            metrics = final_metrics(run)
            all_held = percent(each[-1].right, each[-1].of)
            rows.append(
                (run.name, f"{metrics['lm_loss']:.4f}", percent(seen.right, seen.of), all_held, *by_sign(each[-1]))
            )
    return Page(
        title="Arithmetic",
        shows=f"""
A dense model of 3 layers and hidden size 64 learns a∘b for whole numbers from 1 to 20 and the signs + − ×, digit by
digit, without intermediate results, from {EPOCHS} epochs of {EPOCH:,} rows. There are {len(problems()):,} problems:
{HELD_OUT:.0%} of them, by the hash of their text, are held out, and the rows of an epoch are draws from the others.""",
        script=script_of("arithmetic"),
        bars=[
            Bar(
                f"held-out problems, {TOLD[name]}, exact",
                "≥ 99 %" if name == "problems" else "reported",
                " / ".join(percent(one.right, one.of) for one in each),
                name != "problems" or all(one.share >= 0.99 for one in each),
            )
            for name, each in found.items()
        ],
        tables=[
            Table(
                "By split and seed",
                (
                    "run",
                    "training loss, last step",
                    "seen problems",
                    "held out",
                    *(f"held out, {one}" for one in SIGNS),
                ),
                rows,
            )
        ],
        samples=found["problems"][0].shown(10) + found["pairs"][0].shown(5),
        seconds=elapsed(folder),
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["rows", folder]:
            write(Path(folder))
        case ["page", folder, path]:
            page(Path(folder)).write(Path(path))
        case _:
            sys.exit(__doc__)

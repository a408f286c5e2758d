"""Bracketed expressions of three operands from 1 to 50 with + − ×, in both bracketings.

    python -m data.examples.expressions rows FOLDER   # train.jsonl, direct.jsonl, held_out.jsonl, tokenizer/
    python -m data.examples.expressions page FOLDER PAGE   # the page, from the answers in FOLDER

The model writes its working, one operation after the other: `(12*34)-5=` → `12*34=48+360=408;408-5=403`. What follows
the last `=` is the answer, and alone is scored. A product by a number of two digits is the sum of two: by its ones, by
its tens.
"""

from __future__ import annotations

import random
from pathlib import Path

from data.examples.page import Bar, Page, Table, command_line, elapsed, percent, script_of
from data.examples.score import Scored, scored, write_prompts
from data.examples.splits import Row, is_held_out, leaks, write_rows
from data.examples.training import active_parameters, final_metrics, runs
from data.examples.vocabulary import write_tokenizer

OPERANDS = range(1, 51)
SIGNS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
HELD_OUT = 0.05  # of the distinct expressions
EPOCH, TESTED = 100_000, 1_000  # rows
EPOCHS, MOST_EPOCHS = 4, 30  # of the script, and allowed
KINDS = {"dense": "dense", "sparse": "8 experts, 2 a token", "direct": "dense, without working"}


def expression(generator: random.Random) -> Row:
    """One expression with its working, and its value as `answer`: operands, signs and brackets all equally likely."""
    a, b, c = (generator.choice(OPERANDS) for _ in range(3))
    first, second = (generator.choice([*SIGNS]) for _ in range(2))
    if generator.random() < 0.5:
        prompt = f"({a}{first}{b}){second}{c}="
        inner, begun = worked(a, first, b, cut=b)
        value, ended = worked(inner, second, c, cut=c)
    else:
        prompt = f"{a}{first}({b}{second}{c})="
        inner, begun = worked(b, second, c, cut=c)
        value, ended = worked(a, first, inner, cut=a)
    return {"prompt": prompt, "completion": f"{begun};{ended}", "answer": str(value)}


def worked(left: int, sign: str, right: int, cut: int) -> tuple[int, str]:
    """(value, its working): `12*34=48+360=408` with cut=34. `cut` is the operand that a product is cut by."""
    value = SIGNS[sign](left, right)
    if sign != "*" or cut < 10:
        return value, f"{left}{sign}{right}={value}"
    whole = value // cut
    return value, f"{left}{sign}{right}={whole * (cut % 10)}{whole * (cut // 10 * 10):+d}={value}"


def answer(text: str) -> str:
    return text.rpartition("=")[2]


def draw(count: int, seed: int, held_out: bool) -> list[Row]:
    """`count` distinct expressions of one side."""
    generator, rows = random.Random(seed), dict[str, Row]()
    while len(rows) < count:
        row = expression(generator)
        if is_held_out(row["prompt"], HELD_OUT) is held_out:
            rows.setdefault(row["prompt"], row)
    return [*rows.values()]


def signs(prompt: str) -> str:
    """What makes a row hard: how many of its two signs are ×."""
    return f"{prompt.count('*')} ×"


def write(folder: Path) -> None:
    train, held_out = draw(EPOCH, 0, held_out=False), draw(TESTED, 1, held_out=True)
    assert not leaks(train, held_out)
    for name, column in (("train", "completion"), ("direct", "answer")):
        rows = [{"prompt": row["prompt"], "completion": row[column]} for row in train]
        write_rows(folder / f"{name}.jsonl", rows)
    write_rows(folder / "held_out.jsonl", held_out)
    write_prompts(folder / "held_out.txt", held_out)
    write_tokenizer(folder / "tokenizer", "0123456789+-*=();")


def page(folder: Path) -> Page:
    rows, found = [], {kind: list[Scored]() for kind in KINDS}
    for kind, each in found.items():
        for run in runs(folder, f"{kind}_*"):
            each.append(scored(folder / "held_out.jsonl", run / "held_out.jsonl", answer))
            metrics = final_metrics(run)
            parts = [each[-1].only(lambda one, n=n: one.prompt.count("*") == n) for n in range(3)]
            rows.append(
                (
                    *(run.name, KINDS[kind], f"{active_parameters(run):,}", f"{metrics['val_loss']:.4f}"),
                    *(percent(one.right, one.of) for one in (each[-1], *parts)),
                )
            )
    return Page(
        title="Expressions",
        shows=f"""
Small models of 3 layers and hidden size 64 learn to evaluate expressions of three operands from 1 to 50 with
brackets, digit by digit, from {EPOCHS} epochs of {EPOCH:,} rows: a dense model, and one whose MLPs are 8 experts,
2 a token, with no more active parameters. Which expressions were used where 80 % was reported isn't known; here

- operands, the signs + − ×, and the two bracketings, `(a∘b)∘c` and `a∘(b∘c)`, are drawn uniformly and independently;
- **the model writes its working**, one operation after the other: `(12*34)-5=` → `12*34=48+360=408;408-5=403`. A
  product by a number of two digits is the sum of two, by its ones and by its tens. What follows the last `=` is the
  answer, and alone is scored. `direct` is the same dense model that writes the value alone;
- {HELD_OUT:.0%} of all distinct expressions, by the hash of their text, are held out; {TESTED:,} of them, drawn the
  same way, are asked. The {EPOCH:,} training rows are distinct, and the same in each epoch.""",
        script=script_of("expressions"),
        bars=[
            Bar(
                f"held-out expressions, {KINDS[kind]}, exact value",
                "≥ 90 %" if kind != "direct" else "reported",
                " / ".join(percent(one.right, one.of) for one in each),
                kind == "direct" or all(one.share >= 0.9 for one in each),
            )
            for kind, each in found.items()
            if each
        ]
        + [Bar("epochs", f"≤ {MOST_EPOCHS}", str(EPOCHS), EPOCHS <= MOST_EPOCHS)],
        tables=[
            Table(
                "By seed",
                ("run", "", "active parameters", "validation loss", "held out", "no ×", "one ×", "two ×"),
                rows,
            )
        ],
        samples=found["sparse"][0].shown(8),
        seconds=elapsed(folder),
    )


if __name__ == "__main__":
    command_line(__doc__, write, page)

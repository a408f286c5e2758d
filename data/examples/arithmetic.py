"""a∘b with + − ×: trained on operands up to 50, asked about held-out problems with operands from 1 to 20.

    python -m data.examples.arithmetic rows FOLDER        # worked.jsonl, direct.jsonl, held_out.jsonl, …
    python -m data.examples.arithmetic page FOLDER PAGE   # the page, from the answers in FOLDER

Held out are pairs of operands, by the hash of the problem with its smaller operand first: where 7*8 is held out, 8*7 is
too. A product by a number of two digits is written as the sum of two, by its ones and by its tens: `17*13=` →
`51+170=221`. Only the answer, which follows the last `=`, is scored.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from data.examples.page import Bar, Page, Table, command_line, elapsed, percent, script_of
from data.examples.score import Scored, scored, write_prompts
from data.examples.splits import Row, leaks, split, write_rows
from data.examples.training import active_parameters, final_metrics, runs
from data.examples.vocabulary import write_tokenizer

ASKED, TRAINED = 20, 50  # the largest operand
SIGNS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
HELD_OUT = 0.1  # of the pairs
EPOCH, EPOCHS = 10_000, 20  # rows of an epoch, other draws in each; a quarter of them with operands up to ASKED
KINDS = {"worked": f"operands to {TRAINED}, products worked out", "direct": f"operands to {ASKED}, value alone"}
TESTS = {"held_out": f"held out, 1 to {ASKED}", "seen": f"seen, 1 to {ASKED}", "larger": f"held out, to {TRAINED}"}


def worked(left: int, sign: str, right: int, cut: int) -> tuple[int, str]:
    """(value, how it is written): `12*34` with cut=34 → `48+360=408`. `cut` is the operand that a product is cut by."""
    value = SIGNS[sign](left, right)
    if sign != "*" or cut < 10:
        return value, str(value)
    whole = value // cut
    return value, f"{whole * (cut % 10)}{whole * (cut // 10 * 10):+d}={value}"


def problem(a: int, sign: str, b: int) -> Row:
    value, text = worked(a, sign, b, cut=b)
    return {"prompt": f"{a}{sign}{b}=", "completion": text, "answer": str(value)}


def problems(largest: int) -> list[Row]:
    """Each once: three signs, all pairs of operands."""
    operands = range(1, largest + 1)
    return [problem(a, sign, b) for sign in SIGNS for a in operands for b in operands]


def parts(prompt: str) -> tuple[int, str, int]:
    found = re.fullmatch(r"(\d+)([-+*])(\d+)=", prompt)
    assert found is not None, prompt
    return int(found[1]), found[2], int(found[3])


def pair(row: Row) -> str:
    """The problem with its smaller operand first."""
    a, sign, b = parts(row["prompt"])
    return f"{min(a, b)}{sign}{max(a, b)}"


def is_small(row: Row) -> bool:
    a, _, b = parts(row["prompt"])
    return max(a, b) <= ASKED


def answer(text: str) -> str:
    return text.rpartition("=")[2]


def drawn(rows: list[Row], count: int, seed: int) -> list[Row]:
    """`count` rows: all of them as often as it goes, then a random part."""
    whole, rest = divmod(count, len(rows))
    return rows * whole + random.Random(seed).sample(rows, rest)


def write(folder: Path) -> None:
    train, held_out = split(problems(TRAINED), HELD_OUT, pair)
    assert not leaks(train, held_out, pair)
    small, large = ([row for row in train if is_small(row) is side] for side in (True, False))
    count = EPOCH * EPOCHS
    sets = {
        "worked": drawn(small, count // 4, seed=0) + drawn(large, count - count // 4, seed=1),
        "direct": [row | {"completion": row["answer"]} for row in drawn(small, count, seed=0)],
    }
    for name, rows in sets.items():
        random.Random(2).shuffle(rows)
        write_rows(folder / f"{name}.jsonl", [{key: row[key] for key in ("prompt", "completion")} for row in rows])
    larger = [row for row in held_out if not is_small(row)]
    for name, rows in (("held_out", [row for row in held_out if is_small(row)]), ("seen", small), ("larger", larger)):
        write_rows(folder / f"{name}.jsonl", rows)
        write_prompts(folder / f"{name}.txt", rows)
    write_tokenizer(folder / "tokenizer", "0123456789+-*=")


def by_sign(found: Scored) -> list[str]:
    return [
        percent(one.right, one.of)
        for sign in SIGNS
        for one in [found.only(lambda sample, sign=sign: parts(sample.prompt)[1] == sign)]
    ]


def page(folder: Path) -> Page:
    rows, found = [], {kind: list[Scored]() for kind in KINDS}
    for kind, each in found.items():
        for run in runs(folder, f"{kind}_*"):
            tests = [scored(folder / f"{name}.jsonl", run / f"{name}.jsonl", answer) for name in TESTS]
            each.append(tests[0])
            metrics = final_metrics(run)
            shares = [percent(one.right, one.of) for one in tests]
            rows.append(
                (run.name, f"{active_parameters(run):,}", f"{metrics['lm_loss']:.4f}", *shares, *by_sign(tests[0]))
            )
    small = [row for row in problems(ASKED)]
    return Page(
        title="Arithmetic",
        shows=f"""
A dense model of 3 layers and hidden size 64 learns a∘b with the signs + − ×, digit by digit, from {EPOCHS} epochs of
{EPOCH:,} drawn rows. It is asked about problems with operands from 1 to {ASKED}, of which there are {len(small):,}.

- **Held out** are pairs of operands: {HELD_OUT:.0%} of them, by the hash of the problem with its smaller operand
  first. Where 7*8 is held out, 8*7 is too, so that swapping the operands gives no answer away.
- **Training rows** have operands up to {TRAINED}; a quarter of them, up to {ASKED}. The larger ones are there
  so that sums and differences can't be learnt by heart.
- **Products by a number of two digits are worked out**: `17*13=` → `51+170=221`, the ones and the tens of the second
  operand. Only the answer, which follows the last `=`, is scored.
- `direct` uses neither: operands up to {ASKED}, and the value alone.""",
        script=script_of("arithmetic"),
        bars=[
            Bar(
                f"held-out problems, exact value: {KINDS[kind]}",
                "≥ 99 %" if kind == "worked" else "(to compare)",
                " / ".join(percent(one.right, one.of) for one in each),
                kind != "worked" or all(one.share >= 0.99 for one in each),
            )
            for kind, each in found.items()
        ],
        tables=[
            Table(
                "By seed",
                ("run", "parameters", "loss, last step", *TESTS.values(), *(f"held out, {sign}" for sign in SIGNS)),
                rows,
            )
        ],
        samples=found["worked"][0].shown(10) + found["direct"][0].shown(3),
        seconds=elapsed(folder),
    )


if __name__ == "__main__":
    command_line(__doc__, write, page)

"""Training and held-out rows, divided by a hash of what a row asks.

Copies of a question, however often and wherever they come, are on one side; a new row moves no other. Which side it is
depends on nothing else: no seed, no order, no count of rows.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

Row = dict[str, str]
Key = Callable[[Row], str]


def asked(row: Row) -> str:
    """What a row asks: its prompt, in one spelling (NFKC, lower case, single spaces)."""
    return " ".join(unicodedata.normalize("NFKC", row["prompt"]).casefold().split())


def place(content: str) -> float:
    """In [0, 1): the first 8 bytes of the content's SHA-256, as a fraction."""
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") / 2**64


def is_held_out(content: str, share: float) -> bool:
    return place(content) < share


def split(rows: Iterable[Row], share: float, key: Key = asked) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows), each in the order given. `key` is what must not be on both sides."""
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        sides[is_held_out(key(row), share)].append(row)
    return sides


def leaks(train: Iterable[Row], held_out: Iterable[Row], key: Key = asked) -> set[str]:
    """What is asked on both sides."""
    return {key(row) for row in train} & {key(row) for row in held_out}


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """JSONL, one row a line. Creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

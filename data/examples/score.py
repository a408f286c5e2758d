"""Answers of `moe generate prompts_file=… chat=true` against the rows that they answer: exact match."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.examples.page import Sample
from data.examples.splits import Row, read_rows


@dataclass(frozen=True, slots=True)
class Scored:
    samples: list[Sample]

    @property
    def right(self) -> int:
        return sum(sample.is_right for sample in self.samples)

    @property
    def of(self) -> int:
        return len(self.samples)

    @property
    def share(self) -> float:
        return self.right / self.of

    def shown(self, count: int) -> list[Sample]:
        """The first `count` that are right, and as many that are wrong."""
        chosen = []
        for right in (True, False):
            chosen += [sample for sample in self.samples if sample.is_right is right][:count]
        return chosen

    def only(self, which: Callable[[Sample], bool]) -> Scored:
        return Scored([sample for sample in self.samples if which(sample)])


def write_prompts(path: Path, rows: list[Row]) -> None:
    """One prompt a line, as `prompts_file` reads them."""
    path.write_text("".join(row["prompt"] + "\n" for row in rows), encoding="utf-8")


def scored(rows: Path, answers: Path, final: Callable[[str], str] = str) -> Scored:
    """Each row's `answer`, or its completion, compared with what `final` takes from the model's text. Raises ValueError
    where the answers are not those of the rows."""
    asked = read_rows(rows)
    given = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    if [row["prompt"] for row in asked] != [line["prompt"] for line in given]:
        raise ValueError(f"{answers}: not the answers to {rows}, row by row")
    return Scored(
        [
            Sample(
                row["prompt"],
                row["completion"],
                line["text"],
                right=final(line["text"]) == row.get("answer", row["completion"]),
            )
            for row, line in zip(asked, given, strict=True)
        ]
    )

"""What a benchmark measured: as data, as the text that it prints, as JSON and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from moe.bench.markdown import cell, table

Cell = str | int | float | None
SECONDS = "seconds"  # a table with this first column is drawn as lines, one for each other column (moe.bench.plot)


@dataclass(slots=True)
class ResultTable:
    """The first column names the rows; units are in the columns' names."""

    columns: list[str]
    rows: list[list[Cell]]
    title: str = ""

    def lines(self) -> Iterator[str]:
        """As text; numbers to the right."""
        columns = [list(column) for column in zip(self.columns, *self.rows, strict=True)]
        padded = []
        for name, *values in columns:
            cells = [str(name), *map(cell, values)]
            width = max(map(len, cells))
            texts = all(isinstance(value, str) for value in values)
            padded.append([f"{each:<{width}}" if texts else f"{each:>{width}}" for each in cells])
        if self.title:
            yield f"{self.title}:"
        yield from ("  ".join(cells).rstrip() for cells in zip(*padded, strict=True))


@dataclass(slots=True)
class Results:
    """Tables, then notes, then the figures that the benchmark is about: {line, with `{}` in place of the number: the
    number}."""

    tables: list[ResultTable] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """What is printed; the last figure ends it."""
        for each in self.tables:
            yield from each.lines()
        yield from self.notes
        yield from stated(self.figures)

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def markdown(values: dict[str, Any]) -> Iterator[str]:
    """`Results.values` as Markdown."""
    for each in values["tables"]:
        yield from ([f"{each['title']}:", ""] if each["title"] else [])
        yield from (*table(each["columns"], each["rows"]), "")
    yield from (f"- {note}" for note in values["notes"])
    yield from (f"- **{line}**" for line in stated(values["figures"]))


def stated(figures: dict[str, float]) -> Iterator[str]:
    """The lines of `Results.figures`."""
    return (line.replace("{}", f"{number:.2f}") for line, number in figures.items())

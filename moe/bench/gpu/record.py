"""A stage's results, written to a JSON file whenever one is added."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

Cell = str | int | float | None


def nothing() -> dict[str, Any]:
    """The results of a stage that recorded none."""
    return {"headline": "", "facts": {}, "tables": [], "checks": [], "figures": {}}


class Record:
    """One stage's results: facts, tables, checks against limits, and figures that `moe.bench.gpu.requirements` judges.
    Every call rewrites the file atomically."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, Any] = nothing()
        self._save()

    def headline(self, text: str) -> None:
        """The stage's result in a few words, for the summary."""
        self.values["headline"] = text
        self._save()

    def facts(self, **facts: Cell) -> None:
        self.values["facts"] |= {name: _plain(value) for name, value in facts.items()}
        self._save()

    def row(self, table: str, **cells: Cell) -> None:
        """Adds a row to the table of that title, whose columns are the first row's names."""
        found = [each for each in self.values["tables"] if each["title"] == table]
        if not found:
            found = [{"title": table, "columns": list(cells), "rows": []}]
            self.values["tables"] += found
        assert found[0]["columns"] == list(cells), f"{table}: {list(cells)} are not its columns"
        found[0]["rows"].append([_plain(value) for value in cells.values()])
        self._save()

    def check(self, name: str, value: float, limit: float) -> None:
        """The stage fails unless `value` ≤ `limit`; NaN fails."""
        self.values["checks"].append({"name": name, "value": _plain(value), "limit": limit, "passed": value <= limit})
        self._save()

    def figure(self, key: str, value: float, beside: str) -> None:
        """What a requirement is about; `beside` says how it was measured. A stage passes even if it isn't met."""
        self.values["figures"][key] = {"value": _plain(value), "beside": beside}
        self._save()

    def _save(self) -> None:
        write_atomically(self._path, json.dumps(self.values, allow_nan=False))


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that readers find either the old text or the new one, even if this process is killed."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _plain(value: Cell) -> Cell:
    """NaN and infinity, which JSON lacks, as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

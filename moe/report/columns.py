"""Every scalar metric of a run as a column: the names come from metrics.jsonl, so that a new router's are shown too."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

LAYERS, WORST = "_layers", "_worst_layer"  # of NAME: its values by layer, the largest of them


def number(value: Any) -> float:
    """A finite float, or NaN for anything else (null, NaN, text, a missing key)."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if is_number else math.nan


class Columns:
    """Gathers lines of metrics.jsonl. A name that first comes late has NaN before."""

    def __init__(self) -> None:
        self._place: dict[str, int] = {}
        self.by_layer: list[str] = []  # names that have values by layer: what the routers measure

    def row(self, line: dict[str, Any]) -> list[float]:
        """The line's scalars in the columns' order; NaN where it has none."""
        values: dict[str, float] = {}
        for name, value in line.items():
            if name.endswith(LAYERS) and isinstance(value, list):
                base = name.removesuffix(LAYERS)
                if value and base not in self.by_layer:
                    self.by_layer.append(base)
                values[base + WORST] = max(map(number, value), default=math.nan)
            elif isinstance(value, int | float) and name != "step":
                values[name] = number(value)
        for name in values:
            self._place.setdefault(name, len(self._place))
        row = [math.nan] * len(self._place)
        for name, value in values.items():
            row[self._place[name]] = value
        return row

    def series(self, rows: list[list[float]]) -> dict[str, np.ndarray]:
        """{name: one float a row}."""
        table = np.full((len(rows), len(self._place)), math.nan)
        for index, row in enumerate(rows):
            table[index, : len(row)] = row
        return {name: table[:, place] for name, place in self._place.items()}

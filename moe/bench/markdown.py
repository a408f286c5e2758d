"""Markdown tables of numbers, for the sections of docs/performance.md. Standard library only."""

from __future__ import annotations

from typing import Any


def table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    """A Markdown table."""
    head = [name.replace("_", " ") for name in columns]
    cells = [[cell(value).replace("|", "\\|") for value in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]


def cell(value: Any) -> str:
    """Text unchanged, integers with separators, other numbers with four digits, "–" for None."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (abs(value) >= 1000 and value == value):
        return f"{value:,.0f}"
    return f"{value:.4g}"

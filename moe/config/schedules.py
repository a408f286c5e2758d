"""Values that change over optimizer steps, given at some of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe.config.rules import require


def by_number(key: str, items: Mapping[Any, Any]) -> dict[int, Any]:
    """The mapping with its keys as whole numbers ≥ 0, which the command line may have made texts. Raises UserError."""
    for name in items:
        require(str(name).isdecimal(), f"{key}.{name}: must be a number, counted from 0")
    return {int(name): item for name, item in items.items()}


def points_of(key: str, points: object, *, whole: bool) -> dict[int, float]:
    """A schedule, {step: value}, checked. Raises UserError when it is none, or has a fraction where `whole`."""
    shown = f"{key}={{0:2,1000:1}}" if whole else f"{key}={{0:0.1,1000:0.01}}"
    require(isinstance(points, Mapping) and bool(points), f"{key}={points} must be values by step, as in {shown}")
    assert isinstance(points, Mapping)
    checked = by_number(key, points)
    for step, value in checked.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        require(number, f"{key}.{step}={value} must be a number")
        require(not whole or value == int(value), f"{key}.{step}={value} must be a whole number")
    return checked


def value_at(points: Mapping[int, float], step: int, *, whole: bool) -> float | int:
    """The value at `step`: linear between the steps in `points`, constant outside; a whole number holds until the next
    step in `points`."""
    before = max((at for at in points if at <= step), default=min(points))
    after = min((at for at in points if at > step), default=before)
    if whole:
        return int(points[before])
    if step <= before or before == after:
        return float(points[before])
    return points[before] + (points[after] - points[before]) * (step - before) / (after - before)

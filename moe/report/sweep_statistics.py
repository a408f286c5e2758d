"""What may be concluded from a sweep's numbers: points and their seeds, the Pareto front, intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe.report.sweep_reader import SweepHistory, TrialRow

# Student's t, two-sided 95 %, by degrees of freedom; between these the next smaller one is taken (a wider interval).
T95 = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 12: 2.179,
    15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980,
}  # fmt: skip
BINS = 4  # of a searched number, in the chart of its effect


@dataclass(slots=True)
class Point:
    """The complete trials of one point of the space, one a seed."""

    trials: list[TrialRow]

    @property
    def best(self) -> TrialRow:
        return self.trials[0]

    def values(self, name: str) -> list[float]:
        return [value for row in self.trials if math.isfinite(value := row.value(name))]

    def mean(self, name: str) -> float:
        values = self.values(name)
        return math.fsum(values) / len(values) if values else math.nan


@dataclass(slots=True)
class Difference:
    """A point's objective minus another's: the mean over the seeds that both have, and its 95 % interval,
    `mean` ± `half` (NaN with fewer than two seeds)."""

    point: Point
    seeds: int
    mean: float
    half: float

    @property
    def within_noise(self) -> bool | None:
        """None where it can't be told."""
        return None if math.isnan(self.half) else abs(self.mean) <= self.half


def points(sweep: SweepHistory) -> list[Point]:
    """Points by the mean of their first objective, the best first."""
    grouped: dict[str, list[TrialRow]] = {}
    for row in sweep.complete():
        grouped.setdefault(json.dumps(row.params, sort_keys=True, default=str), []).append(row)
    sign = -1 if sweep.objectives[0] in sweep.maximize else 1
    found = [Point(rows) for rows in grouped.values()]
    return sorted(found, key=lambda point: sign * point.mean(sweep.objectives[0]))


def pareto_front(found: list[Point], objectives: Sequence[str], maximize: Sequence[str]) -> list[Point]:
    """Points than which no other is at least as good in all objectives and better in one, by their means."""

    def costs(point: Point) -> list[float]:
        return [(-1 if name in maximize else 1) * point.mean(name) for name in objectives]

    whole = [point for point in found if all(math.isfinite(cost) for cost in costs(point))]
    return [
        point
        for point in whole
        if not any(
            all(a <= b for a, b in zip(costs(other), costs(point), strict=True)) and costs(other) != costs(point)
            for other in whole
        )
    ]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half of Student's 95 % interval of it); the half is NaN with fewer than two values."""
    if not len(values):
        return math.nan, math.nan
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, _t95(len(values) - 1) * deviation / math.sqrt(len(values))


def _t95(freedom: int) -> float:
    return T95[max(known for known in T95 if known <= freedom)]


def differences(base: Point, found: list[Point], name: str) -> list[Difference]:
    """Each other point's objective minus `base`'s, paired by seed: points trained with the same seed see the same data,
    so that its effect cancels."""
    against = {row.seed: row.value(name) for row in base.trials}
    told = []
    for point in found:
        if point is not base:
            paired = [row.value(name) - against[row.seed] for row in point.trials if row.seed in against]
            mean, half = interval(paired)
            told.append(Difference(point, len(paired), mean, half))
    return told


def effect(found: list[Point], key: str, name: str, *, log: bool) -> list[tuple[Any, int, float, float]]:
    """(value of the searched key, points, mean, half interval) of the objective. A point counts once, by the mean of
    its seeds: these differ by noise alone.

    One for each value of a categorical key, or for BINS bins of a number with equally many points, at their middle.
    """
    pairs = [(point.best.params[key], point.mean(name)) for point in found if math.isfinite(point.mean(name))]
    values = list(dict.fromkeys(value for value, _ in pairs))
    number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not number or len(values) <= BINS:
        ordered = sorted(values) if number else values
        return [(value, *_summary([result for other, result in pairs if other == value])) for value in ordered]
    pairs.sort(key=lambda pair: pair[0])
    bins = [part for part in np.array_split(np.array(pairs, dtype=float), min(BINS, len(pairs) // 2)) if len(part)]
    return [
        (float(np.exp(np.log(part[:, 0]).mean()) if log else part[:, 0].mean()), *_summary(part[:, 1].tolist()))
        for part in bins
    ]


def _summary(values: list[float]) -> tuple[int, float, float]:
    return len(values), *interval(values)

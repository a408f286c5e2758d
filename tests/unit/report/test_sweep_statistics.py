"""Intervals, the Pareto front, what is within seed noise, worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moe.report.sweep_reader import TrialRow
from moe.report.sweep_statistics import Point, differences, effect, interval, pareto_front


def _row(seed: int, loss: float, violation: float | None = 1.0, **params: Any) -> TrialRow:
    metrics = {"val_loss": loss, "max_violation": violation}
    return TrialRow(seed, params, seed, metrics, "COMPLETE", "", 1.0, "trials/0", [])


def test_students_interval() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / math.sqrt(3)))  # deviation 1, 2 degrees of freedom
    assert math.isnan(interval([1.0])[1])
    assert math.isnan(interval([])[0])


def test_differences_are_paired_by_seed() -> None:
    """Seeds that move both points alike cancel: 0.1 apart at each seed is a difference, whatever the seeds do."""
    best = Point([_row(seed, 5.0 + seed) for seed in range(3)])
    worse = Point([_row(seed, 5.1 + seed + 0.001 * (seed - 1)) for seed in range(3)])
    noisy = Point([_row(seed, 5.0 + 2 * seed) for seed in range(3)])
    alone = Point([_row(1, 6.5)])
    told = differences(best, [worse, best, noisy, alone], "val_loss")
    assert [one.within_noise for one in told] == [False, True, None]
    assert told[0].mean == pytest.approx(0.1)
    assert told[2].mean == pytest.approx(0.5)


def test_the_front_has_no_point_that_another_beats() -> None:
    found = [Point([_row(0, loss, violation)]) for loss, violation in ((1, 3), (2, 2), (3, 3), (3, 1), (4, None))]
    front = pareto_front(found, ["val_loss", "max_violation"], [])
    assert [(point.mean("val_loss"), point.mean("max_violation")) for point in front] == [(1, 3), (2, 2), (3, 1)]
    front = pareto_front(found, ["val_loss", "max_violation"], ["max_violation"])
    assert [point.mean("val_loss") for point in front] == [1]


def test_an_effect_is_by_value_or_by_bins_of_equally_many_points() -> None:
    found = [Point([_row(index, float(index), kind="ab"[index % 2], rate=10.0**index)]) for index in range(8)]
    assert [(value, count, mean) for value, count, mean, _ in effect(found, "kind", "val_loss", log=False)] == [
        ("a", 4, 3.0),
        ("b", 4, 4.0),
    ]
    bins = effect(found, "rate", "val_loss", log=True)
    assert [(count, mean) for _, count, mean, _ in bins] == [(2, 0.5), (2, 2.5), (2, 4.5), (2, 6.5)]
    assert bins[0][0] == pytest.approx(10**0.5)


def test_the_seeds_of_a_point_are_one_sample_of_an_effect() -> None:
    found = [
        Point([_row(seed, loss + 0.001 * (seed - 1), kind="a", rate=rate) for seed in range(3)])
        for loss, rate in ((1.0, 0.1), (1.2, 0.2))
    ]
    ((value, count, mean, half),) = effect(found, "kind", "val_loss", log=False)
    assert (value, count) == ("a", 2)
    assert (mean, half) == (pytest.approx(1.1), pytest.approx(12.706 * 0.1))  # deviation 0.2 / √2, 1 degree of freedom

"""Baselines and errors against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe.analysis.statistics import Estimate, binomial_error, overlap_by_chance, ratio


def test_a_ratio_and_its_error_between_sequences() -> None:
    # r = (1 + 3) / 4 = 1; residuals −1 and 1; se = √(2/1 · 2) / 4
    estimate = ratio(np.array([1.0, 3.0]), np.array([2, 2]))
    assert estimate == pytest.approx((1.0, 0.5))
    assert estimate.z == pytest.approx(2.0)
    assert estimate.p == pytest.approx(0.0455, abs=1e-4), "two-sided, normal"


def test_a_ratio_of_equal_sequences_has_the_error_of_their_mean() -> None:
    values = np.array([0.1, 0.4, 0.2, 0.5])
    assert ratio(10 * values, np.full(4, 10)).error == pytest.approx(values.std(ddof=1) / math.sqrt(4))


def test_that_sources_differ_is_no_error() -> None:
    values, sources = np.array([1.0, 3.0, 11.0, 13.0]), np.array([0, 0, 1, 1])
    # r = 7; inside each source the residuals differ from their mean by −1 and 1: se = √(2 · 2/1 · 2) / 4
    assert ratio(values, np.ones(4), sources) == pytest.approx((7.0, math.sqrt(8) / 4))
    assert ratio(values, np.ones(4)).error > 2
    alone = ratio(values, np.ones(4), np.array([0, 0, 0, 1]))
    assert alone == ratio(values, np.ones(4)), "one sequence has no spread of its own"


def test_a_ratio_of_nothing_is_no_number() -> None:
    assert math.isnan(ratio(np.zeros(2), np.zeros(2)).value)
    assert math.isnan(ratio(np.array([1.0]), np.array([2])).error), "one sequence says nothing about errors"
    assert Estimate(0.0, 0.0).z == 0
    assert Estimate(1.0, 0.0).p == 0


def test_the_papers_baselines() -> None:
    """arXiv 2401.04088, table 5: 12.5 % and, for first or second choice, 46 %: 1 − (6 · 5)/(8 · 7)."""
    assert overlap_by_chance(8, 1) == pytest.approx(0.125)
    assert overlap_by_chance(8, 2) == pytest.approx(1 - 6 * 5 / (8 * 7))
    assert overlap_by_chance(4, 1, 2) == pytest.approx(0.5)
    assert overlap_by_chance(8, 0, 2) == 0
    assert overlap_by_chance(3, 2, 2) == 1, "two of three always meet two of three"


def test_the_baselines_are_those_of_drawn_sets() -> None:
    random = np.random.default_rng(0)
    draws = [set(random.permutation(6)[:2]) & set(random.permutation(6)[:3]) for _ in range(4000)]
    assert np.mean([bool(met) for met in draws]) == pytest.approx(overlap_by_chance(6, 2, 3), abs=0.03)


def test_the_random_spread_of_a_share() -> None:
    assert binomial_error(8, 1, 100) == pytest.approx(math.sqrt(1 / 8 * 7 / 8 / 100))
    assert binomial_error(8, 2, 100) == pytest.approx(math.sqrt(1 / 4 * 3 / 4 / 100) / 2)
    assert binomial_error(4, 4, 100) == 0, "every token takes all"
    assert math.isnan(binomial_error(4, 2, 0))

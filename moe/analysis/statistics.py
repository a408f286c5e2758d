"""Estimates whose errors respect that tokens of one sequence aren't independent.

Shapes: B sequences.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A ratio and its standard error; NaN error with fewer than two sequences."""

    value: float
    error: float

    @property
    def z(self) -> float:
        """value / error; 0 where both are 0."""
        if self.value == 0:
            return 0.0
        return self.value / self.error if self.error else math.copysign(math.inf, self.value)

    @property
    def p(self) -> float:
        """Two-sided probability of a |z| as large under the normal distribution."""
        return math.nan if math.isnan(self.error) else math.erfc(abs(self.z) / math.sqrt(2))


def ratio(numerators_B: np.ndarray, denominators_B: np.ndarray) -> Estimate:
    """Σ numerators / Σ denominators, with the standard error of a ratio estimator over sequences as clusters:

    se² = n/(n−1) · Σ (yᵢ − r·xᵢ)² / (Σ xᵢ)² (Cochran, "Sampling Techniques", 3rd ed., eq. 6.12, large population).
    """
    total = float(denominators_B.sum())
    if total == 0:
        return Estimate(math.nan, math.nan)
    value, n = float(numerators_B.sum()) / total, int((denominators_B > 0).sum())
    if n < 2:
        return Estimate(value, math.nan)
    residuals_B = numerators_B - value * denominators_B
    return Estimate(value, math.sqrt(n / (n - 1) * float((residuals_B**2).sum())) / total)


def overlap_by_chance(num_experts: int, chosen: int, chosen_next: int | None = None) -> float:
    """1 − C(E−a, b)/C(E, b): the probability that two random sets of a and b of E experts share one; b = a by default.

    With a = b = 1 it is 1/E; E = 8, a = b = 2 gives 46.4 %, the baseline of arXiv 2401.04088, table 5.
    """
    other = chosen if chosen_next is None else chosen_next
    return 1 - math.comb(num_experts - chosen, other) / math.comb(num_experts, other)


def binomial_error(num_experts: int, per_token: float, tokens: int) -> float:
    """Standard deviation of one expert's share of the choices when each of `tokens` independent tokens takes
    `per_token` different experts at random: √(q(1−q)/n)/k, q = k/E."""
    if not tokens or not per_token:
        return math.nan
    taken = min(1.0, per_token / num_experts)
    return math.sqrt(taken * (1 - taken) / tokens) / per_token

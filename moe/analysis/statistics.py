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


def ratio(numerators_B: np.ndarray, denominators_B: np.ndarray, sources_B: np.ndarray | None = None) -> Estimate:
    """Σ numerators / Σ denominators, with the standard error of a ratio estimator over sequences as clusters:

    se² = Σ n/(n−1) · Σ (eᵢ − ē)² / (Σ xᵢ)², eᵢ = yᵢ − r·xᵢ (Cochran, "Sampling Techniques", 3rd ed., §6.3 and §6.11,
    large population), the outer sum over sources: each gives a fixed number of sequences, so that sources differ is no
    error. Without `sources_B`, or where a source has one sequence, all are one source. Sequences whose x is 0 don't
    count.
    """
    there_B = denominators_B > 0
    y_B, x_B = numerators_B[there_B], denominators_B[there_B]
    total = float(x_B.sum())
    if total == 0:
        return Estimate(math.nan, math.nan)
    value = float(y_B.sum()) / total
    strata_B = np.zeros(len(x_B), np.int64) if sources_B is None else sources_B[there_B]
    if (np.unique(strata_B, return_counts=True)[1] < 2).any():
        strata_B = np.zeros(len(x_B), np.int64)
    if len(x_B) < 2:
        return Estimate(value, math.nan)
    residuals_B = y_B - value * x_B
    variances = [
        len(own) / (len(own) - 1) * float(((own - own.mean()) ** 2).sum())
        for own in (residuals_B[strata_B == source] for source in np.unique(strata_B))
    ]
    return Estimate(value, math.sqrt(sum(variances)) / total)


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

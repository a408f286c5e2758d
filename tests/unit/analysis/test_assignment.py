"""Shares by source, worked out by hand."""

from __future__ import annotations

import math

import pytest

from moe.analysis.assignment import assignments
from tests.unit.analysis.made import choices, observed


def test_shares_by_source_with_errors_between_sequences() -> None:
    layer = choices([[0, 1], [0, 1], [1, 0], [0, 1], [2, 3], [], [2], [3]], 4, layer=5)
    found = assignments(observed(layer, sequences=[0, 0, 1, 1, 2, 2, 3, 3], sources=[0, 0, 1, 1]))
    assert [(row.layer, row.source, row.which) for row in found] == [
        (5, "s0", "all"), (5, "s0", "first"), (5, "s1", "all"), (5, "s1", "first"),
    ]  # fmt: skip
    every, first, other, _ = found
    assert (every.choices, first.choices, other.choices) == (8, 4, 4)
    assert every.shares_E == [0.5, 0.5, 0, 0]
    assert every.errors_E == [0, 0, 0, 0], "both sequences have the same shares"
    # Expert 0 is first 2 of 2 and 1 of 2 times: r = 3/4, residuals 1/2 and −1/2, se = √(2 · 1/2) / 4.
    assert first.shares_E == pytest.approx([0.75, 0.25, 0, 0])
    assert first.errors_E[0] == pytest.approx(0.25)
    assert other.shares_E == pytest.approx([0, 0, 0.5, 0.5])
    assert first.uniform == 0.25
    assert first.random_error == pytest.approx(math.sqrt(0.25 * 0.75 / 4))


def test_a_source_whose_tokens_no_expert_took() -> None:
    found = assignments(observed(choices([[], [], [0], [1]], 2), sequences=[0, 0, 1, 1], sources=[0, 1]))
    assert found[0].choices == 0
    assert all(math.isnan(share) for share in found[0].shares_E)

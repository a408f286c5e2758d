"""Mutual information of known tables, and its correction."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe.analysis.information import entropy, information, mutual_information
from tests.unit.analysis.made import choices, observed


def test_known_tables() -> None:
    four = np.arange(4).repeat(5)
    assert mutual_information(four, four) == pytest.approx(2.0), "log₂ 4 bits"
    assert mutual_information(four, np.tile(np.arange(5), 4)) == pytest.approx(0.0), "independent"
    # p(x, y) = [[3, 1], [1, 3]] / 8: 6/8 · log₂(3/8 · 4) + 2/8 · log₂(1/8 · 4)
    x, y = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array([0, 0, 0, 1, 0, 1, 1, 1])
    assert mutual_information(x, y) == pytest.approx(0.75 * math.log2(1.5) + 0.25 * math.log2(0.5))
    assert entropy(np.array([1, 1, 2, 0])) == pytest.approx(1.5)


def test_an_expert_that_depends_on_nothing_has_none_left_after_correction() -> None:
    random = np.random.default_rng(0)
    experts = [[int(one)] for one in random.integers(0, 8, 2000)]
    ids = random.integers(0, 300, 2000)
    made = observed(choices(experts, 8), sequences=np.repeat(range(20), 100), sources=[0, 1] * 10, ids=ids)
    by_name = {row.about: row for row in information(made, 60, 0)}
    assert by_name.keys() == {"token", "position", "source"}
    assert by_name["token"].measured > 0.5, "sparse tables look informative"
    for row in by_name.values():
        assert abs(row.corrected) < 0.05
        assert row.p > 0.01


def test_each_relation_is_found() -> None:
    random = np.random.default_rng(0)
    sequences, sources = np.repeat(range(20), 64), [0, 1] * 10
    ids = random.integers(0, 4, len(sequences))
    positions = np.tile(np.arange(64), 20)
    by_token = choices([[int(token)] for token in ids], 4, layer=1)
    by_position = choices([[int(np.log2(position + 1)) % 4] for position in positions], 4, layer=2)
    by_source = choices([[sources[sequence]] for sequence in sequences], 4, layer=3)
    found = information(
        observed(by_token, by_position, by_source, sequences=sequences, sources=sources, ids=ids), 99, 0
    )
    rows = {(row.layer, row.about): row for row in found}
    assert rows[1, "token"].corrected == pytest.approx(rows[1, "token"].entropy, abs=0.02)
    assert rows[2, "position"].corrected == pytest.approx(rows[2, "position"].entropy, abs=0.1)
    assert rows[3, "source"].measured == pytest.approx(1.0)
    assert {rows[key].p for key in ((1, "token"), (2, "position"), (3, "source"))} == {0.01}
    assert rows[1, "source"].p > 0.01


def test_one_source_has_no_information_about_it() -> None:
    made = observed(choices([[0], []], 2), sequences=[0, 1], sources=[0, 0])
    assert [row.about for row in information(made, 3, 0)] == ["token", "position"]

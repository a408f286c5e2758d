"""Repetition rates on sequences made by hand, and what the two baselines say."""

from __future__ import annotations

import numpy as np
import pytest

from moe.analysis.repetition import meeting_share, repetitions
from moe.analysis.statistics import overlap_by_chance
from tests.unit.analysis.made import choices, observed


def test_first_and_first_or_second_by_hand() -> None:
    # Pairs of first choices: 0=0 yes, 0≠1, 1≠2. Of both: {0,1}{0,2} meet, {0,2}{1,3} don't, {1,3}{2,1} meet.
    layer = choices([[0, 1], [0, 2], [1, 3], [2, 1]], 4)
    first, either = repetitions(observed(layer, sequences=[0] * 4, sources=[0]))
    assert (first.measure, first.pairs, first.rate, first.uniform) == ("first", 3, pytest.approx(1 / 3), 0.25)
    assert (either.measure, either.rate) == ("first or second", pytest.approx(2 / 3))
    assert either.uniform == pytest.approx(overlap_by_chance(4, 2))
    assert first.shuffled == pytest.approx(2 / 12), "of 4 · 3 ordered pairs 2 are of expert 0"


def test_pairs_end_where_a_document_does() -> None:
    found = repetitions(observed(choices([[0], [0], [0], [0]], 2), sequences=[0] * 4, sources=[0], pieces=[0, 0, 1, 1]))
    assert found[0].pairs == 2


def test_tokens_with_none_or_many_experts() -> None:
    layer = choices([[], [0, 1, 2], [2, 1], [0]], 3)
    first, _, every = repetitions(observed(layer, sequences=[0] * 4, sources=[0]))
    assert (every.measure, every.pairs, every.rate) == ("any", 3, pytest.approx(1 / 3))
    assert first.rate == 0
    chance = [overlap_by_chance(3, 0, 3), overlap_by_chance(3, 3, 2), overlap_by_chance(3, 2, 1)]
    assert every.uniform == pytest.approx(np.mean(chance))


def test_the_shuffled_baseline_is_the_mean_over_permutations() -> None:
    random = np.random.default_rng(1)
    taken_PE = random.random((30, 5)) < 0.3
    rates = []
    for _ in range(600):
        shuffled = random.permutation(taken_PE)
        rates.append((shuffled[1:] & shuffled[:-1]).any(1).mean())
    assert meeting_share(taken_PE) == pytest.approx(np.mean(rates), abs=4 * np.std(rates) / np.sqrt(len(rates)))


def test_uneven_experts_exceed_uniform_but_not_shuffled() -> None:
    """Independent tokens, expert 0 nine times in ten: more repetition than 1/E, none because of order."""
    random = np.random.default_rng(2)
    experts = np.where(random.random(4000) < 0.9, 0, random.integers(0, 4, 4000))
    made = observed(choices([[int(one)] for one in experts], 4), sequences=np.repeat(range(40), 100), sources=[0] * 40)
    first, _ = repetitions(made)
    assert first.uniform_p < 1e-6
    assert abs(first.excess) < 0.02
    assert first.excess_p > 0.001


def test_runs_of_an_expert_exceed_both_and_sources_are_told_apart() -> None:
    random = np.random.default_rng(3)
    runs = np.repeat(random.integers(0, 4, 500), 4)
    alone = random.integers(0, 4, 2000)
    experts = [[int(one)] for one in np.concatenate([runs, alone])]
    made = observed(choices(experts, 4), sequences=np.repeat(range(40), 100), sources=[0] * 20 + [1] * 20)
    by_source = {row.source: row for row in repetitions(made) if row.measure == "first"}
    assert by_source.keys() == {None, "s0", "s1"}
    assert by_source["s0"].rate == pytest.approx(0.75 + 0.25 / 4, abs=0.03)
    assert by_source["s0"].excess_p < 1e-6
    assert by_source["s1"].excess_p > 0.001

"""The tokens that an expert takes most, and where."""

from __future__ import annotations

import numpy as np
import pytest

from moe.analysis.favourites import contexts, favourites, most_taken
from tests.unit.analysis.made import choices, observed


def test_order_by_excess_over_chance() -> None:
    # Expert 0 takes 6 of 10: of value 0, 4 of 4 (2.4 expected); of value 1, 2 of 4 (2.4); of value 2, 0 of 2.
    assert most_taken(np.array([[4, 0], [2, 2], [0, 2]]), 5) == [
        (0, 0, pytest.approx(2.4)), (1, 2, pytest.approx(0.8)), (1, 1, pytest.approx(1.6)),
    ]  # fmt: skip
    assert most_taken(np.zeros((3, 2)), 5) == []


def test_tokens_and_the_tokens_before_them() -> None:
    ids = [7, 8, 7, 9, 7, 8]
    layer = choices([[0], [1], [0], [1], [0], [1]], 2, layer=3)
    found = favourites(
        observed(layer, sequences=[0, 0, 0, 0, 1, 1], sources=[0, 0], ids=ids), lambda token: f"t{token}"
    )
    rows = {(row.expert, row.where, row.token): row for row in found}
    assert rows.keys() == {
        (0, "token", "t7"),
        (1, "token", "t8"),
        (1, "token", "t9"),
        (1, "previous", "t7"),
        (0, "previous", "t8"),
    }
    assert (rows[0, "token", "t7"].taken, rows[0, "token", "t7"].occurrences) == (3, 3)
    assert rows[0, "token", "t7"].lift == pytest.approx(2.0)
    assert rows[1, "previous", "t7"].occurrences == 3, "each is followed by a token of its document"
    assert rows[0, "previous", "t8"].occurrences == 1, "the last one is followed by none"


def test_contexts_stay_in_their_document() -> None:
    layer = choices([[0], [1], [1, 0], [0]], 2)
    made = observed(layer, sequences=[0, 0, 0, 0], sources=[0], pieces=[0, 0, 1, 1], ids=[4, 5, 6, 7])
    found = [row for row in contexts(made, str) if row.expert == 1]
    assert [(row.before, row.token, row.after, row.weight) for row in found] == [("4", "5", "", 1.0)], "one a sequence"

"""Packing rows into sequences: none is cut or lost, none is too full, few tokens are wasted, memory is bounded."""

import random

import numpy as np
import pytest

from moe.data.bins import MOST_OPEN, WINDOW, Bins
from moe.data.record_encoding import EncodedRow


def rows(sizes):
    return [EncodedRow(np.full(size, number), np.ones(size, bool)) for number, size in enumerate(sizes)]


def packed(sizes, length):
    sequences = []
    bins = Bins(length, sequences.append)
    for row in rows(sizes):
        bins.add(row)
    bins.close()
    return [[int(row.ids_T[0]) for row in sequence] for sequence in sequences]


@pytest.mark.parametrize("length", [64, 512])
def test_every_row_is_in_one_sequence_that_has_room(length):
    dice = random.Random(0)
    sizes = [dice.randrange(2, length + 1) for _ in range(5000)]
    found = packed(sizes, length)
    assert sorted(number for sequence in found for number in sequence) == list(range(5000))
    assert all(sum(sizes[number] for number in sequence) <= length for sequence in found)
    assert packed(sizes, length) == found
    least = sum(sizes) / length
    assert len(found) < 1.05 * least + 1


def test_full_rows_fill_a_sequence_each_and_short_ones_share():
    assert sorted(packed([64] * 3 + [32] * 4, 64)) == [[0], [1], [2], [3, 4], [5, 6]]


def test_only_so_many_rows_are_held():
    sequences = []
    bins = Bins(512, sequences.append)
    for added, row in enumerate(rows([300] * 20 * WINDOW), 1):
        bins.add(row)
        assert added - sum(map(len, sequences)) <= WINDOW + MOST_OPEN
    bins.close()
    assert len(sequences) == 20 * WINDOW

"""Which sequences are routed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moe.analysis.text import batches, choose_sequences, stacked
from moe.config import AnalyzeSettings
from moe.errors import UserError
from tests.unit.analysis.made import corpus, text


def test_sources_take_turns_and_nothing_is_padded(tmp_path: Path) -> None:
    made = corpus(tmp_path)
    found = choose_sequences(made, AnalyzeSettings(sequences=6), 32)
    assert [one.source for one in found] == [0, 1, 0, 1, 0, 1]
    assert {len(one.input_ids_L) for one in found} == {32}
    everything = choose_sequences(made, AnalyzeSettings(sequences=10_000, tokens=10**6), 32)
    for source, stream in enumerate(made.held_out):
        own = [one for one in everything if one.source == source]
        assert sum(len(one.input_ids_L) for one in own) == stream.tokens - 1, "all of it once, and no padding"


def test_tokens_bound_the_sequences(tmp_path: Path) -> None:
    assert len(choose_sequences(corpus(tmp_path), AnalyzeSettings(tokens=4 * 32 + 31), 32)) == 4


def test_too_little_is_one_line(tmp_path: Path) -> None:
    made = corpus(tmp_path)
    with pytest.raises(UserError, match=r"analyze\.tokens=63 must be ≥ 64: 2 sequences of 32 tokens"):
        choose_sequences(made, AnalyzeSettings(tokens=63), 32)
    three = replace(made, source_names=["a", "b", "c"])
    with pytest.raises(UserError, match=r"analyze\.sequences=2 must be ≥ 3: one of each of the 3 sources"):
        choose_sequences(three, AnalyzeSettings(sequences=2), 32)
    one = replace(made, source_names=["a"], held_out=made.held_out[:1])
    with pytest.raises(UserError, match="1 held-out sequences of 20000 tokens: must be ≥ 2; give more text"):
        choose_sequences(one, AnalyzeSettings(), 20_000)


def test_batches_hold_each_sequence_once_and_one_length() -> None:
    sequences = [*text(3), *text(2, length=8), *text(1)]
    found = list(batches(sequences))
    assert sorted(index for members in found for index in members) == list(range(6))
    for members in found:
        ids_BS, labels_BS, documents_BS = stacked([sequences[index] for index in members])
        assert ids_BS.shape == labels_BS.shape == documents_BS.shape
    long = text(5, length=3000)
    assert [len(members) for members in batches(long)] == [1] * 5

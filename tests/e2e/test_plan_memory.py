"""The plan's memory compared with real training steps: growth of the resident set, in one process for each size."""

from __future__ import annotations

import sys

import pytest

from moe.bench.memory import SIZES, measure_apart

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the resident set's peak is read from /proc"),
]


@pytest.mark.parametrize("size", SIZES)
def test_planned_memory_is_within_a_tenth_of_the_peak(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = measure_apart(SIZES[size])
    assert result.measured > 500e6, "too small to tell a model's memory from the allocator's"
    assert abs(result.error) <= 0.10, f"{size}: planned {result.planned:,}, measured {result.measured:,}"

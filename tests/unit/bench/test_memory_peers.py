"""Which sides `moe bench memory_peers` measures in every round; its runs: test_peers.py."""

from __future__ import annotations

from moe.bench.memory_peers import contenders


def test_peers_whose_peak_cannot_become_the_smallest_are_measured_once() -> None:
    assert contenders({"ours": 90, "eager": 100, "grouped_mm": 110, "autocast": 111}) == ["ours", "eager", "grouped_mm"]
    assert contenders({"ours": 200, "eager": 100}) == ["ours", "eager"]

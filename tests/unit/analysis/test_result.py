"""Which layers the page shows one at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moe.analysis.result import Analysis


@pytest.mark.parametrize(
    ("experts", "shown"),
    [
        ([8] * 32, list(range(32))),
        ([64] * 16, [1, 3, 5, 7, 9, 11, 13, 15]),
        ([128] * 48, [23, 47]),
        ([1024, 1024], [1]),
    ],
)
def test_large_models_show_evenly_spaced_layers(experts: list[int], shown: list[int]) -> None:
    layers = [SimpleNamespace(layer=layer, num_experts=count) for layer, count in enumerate(experts)]
    stub: Any = SimpleNamespace(observed=SimpleNamespace(layers=layers))
    assert Analysis.shown_layers(stub) == shown

"""The depths of Mixtral 8x7B whose plan is checked fit the GPU."""

from __future__ import annotations

import pytest

from moe.bench.gpu import memory


@pytest.mark.parametrize(("gpu", "free", "depths"), [("H200", 149e9, (2, 4)), ("H100", 84e9, (1, 2))])
def test_the_deeper_one_is_the_deepest_that_fits(gpu: str, free: int, depths: tuple[int, int]) -> None:
    del gpu
    assert memory.fitting(memory.SIZE, free) == depths


def test_a_gpu_that_holds_one_layer_is_named_too_small() -> None:
    with pytest.raises(RuntimeError, match=r"40 GB don't hold two layers: \d+ GB are planned"):
        memory.fitting(memory.SIZE, 40 * 10**9)

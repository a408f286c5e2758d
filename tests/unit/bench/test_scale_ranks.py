"""Which expert-parallel sizes `moe bench scale` measures under torchrun."""

from __future__ import annotations

import pytest

from moe.bench import scale
from moe.bench.scale_ranks import expert_parallel_sizes
from moe.errors import UserError


@pytest.mark.parametrize(
    ("ranks", "of_a_node", "more", "sizes"),
    [
        (4, 4, [], [1, 2, 4]),
        (6, 6, [], [1, 2]),
        (3, 3, [], [1]),
        (6, 6, ["router.num_experts=12"], [1, 2, 3, 6]),
        (8, 2, [], [1, 2]),
        (8, 2, ["parallel.expert_across_nodes=true"], [1, 2, 4, 8]),
    ],
)
def test_sizes_divide_ranks_and_experts(ranks: int, of_a_node: int, more: list[str], sizes: list[int]) -> None:
    configs = expert_parallel_sizes([*scale.DEFAULTS, *more], ranks, of_a_node)
    assert [config.parallel.expert_parallel_size for config in configs.values()] == list(configs) == sizes
    for config in configs.values():
        config.check_world(ranks, of_a_node)
        assert config.accumulation(ranks) == 1


def test_an_engine_of_one_rank_is_refused() -> None:
    with pytest.raises(UserError, match="engine=plain runs on one rank, not on 2"):
        expert_parallel_sizes([*scale.DEFAULTS, "engine=plain"], 2, 2)

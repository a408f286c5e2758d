"""The `Experts` module: the seeds of its initial values, and the meta device."""

from __future__ import annotations

import torch

from moe.config import ExpertsConfig
from moe.sparse.experts import Experts


def test_initial_values_are_named_by_the_global_expert() -> None:
    whole = {seed: weight.shape for _, weight, seed in Experts(8, 12, 4, ExpertsConfig()).draws(_seed_for)}
    assert list(whole) == [1000, 1001, 1002, 1003, 2000, 2001, 2002, 2003]
    half = Experts(8, 12, 2, ExpertsConfig(), first_expert=2)
    assert {seed: weight.shape for _, weight, seed in half.draws(_seed_for)} == {
        seed: shape for seed, shape in whole.items() if seed % 1000 >= 2
    }


def _seed_for(name: str, expert: int) -> int:
    return {"gate_up_proj": 1000, "down_proj": 2000}[name] + expert


def test_what_is_drawn_is_the_parameters_own_memory() -> None:
    experts = Experts(8, 12, 4, ExpertsConfig())
    with torch.no_grad():
        for _, weight, seed in experts.draws(_seed_for):
            weight.fill_(seed)
    assert experts.gate_up_proj[:, 0, 0].tolist() == [1000, 1001, 1002, 1003]
    assert experts.down_proj[:, 5, 5].tolist() == [2000, 2001, 2002, 2003]


def test_construction_on_the_meta_device() -> None:
    with torch.device("meta"):
        experts = Experts(4096, 14336, 8, ExpertsConfig())
    assert sum(p.numel() for p in experts.parameters()) == 8 * 3 * 4096 * 14336
    assert {p.device.type for p in experts.parameters()} == {"meta"}

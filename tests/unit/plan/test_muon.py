"""Muon's cost beside what torch counts and what the engines hold."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe.config import Config
from moe.config.compose import load_config
from moe.config.optim import matrix_shape
from moe.engine.muon import orthogonalized
from moe.plan.memory import plan_memory
from moe.plan.muon import MuonCost, muon_cost
from moe.plan.trained import parameter_shapes

OVERRIDES = [
    [],
    ["model.mlp=dense", "model.num_hidden_layers=2"],
    ["model.n_shared_experts=1", "model.sparse_layers=every_2", "model.moe_intermediate_size=24"],
]


def composed(*overrides: str) -> Config:
    return load_config(
        ["optim=muon", "model.hidden_size=32", "model.intermediate_size=48", "tracking=none", *overrides]
    )


@pytest.mark.parametrize("overrides", OVERRIDES)
def test_the_flops_are_those_that_torch_counts(overrides: list[str]) -> None:
    config, counted = composed(*overrides), 0
    for name, shape in parameter_shapes(config).items():
        if (matrix := matrix_shape(name, shape)) is not None:
            with FlopCounterMode(display=False) as counter:
                orthogonalized(torch.zeros(math.prod(shape) // math.prod(matrix), *matrix))
            counted += counter.get_total_flops()
    assert counted > 0
    assert muon_cost(config, 1).flops == counted


def test_a_moment_less() -> None:
    """4 bytes of a rank's partition for each parameter that Muon updates, in the run and in its checkpoints."""
    for world, expert in ((1, 1), (2, 1), (4, 2)):
        muon, adamw = (
            plan_memory(composed(f"optim={kind}", f"parallel.expert_parallel_size={expert}"), world, device="cuda")
            for kind in ("muon", "adamw")
        )
        shapes = parameter_shapes(composed()).items()
        by_muon = sum(math.prod(shape) for name, shape in shapes if matrix_shape(name, shape) is not None)
        saved = round(4 * by_muon / world)
        assert adamw.phases["update"]["optimizer"] - muon.phases["update"]["optimizer"] == pytest.approx(saved, abs=2)
        assert adamw.checkpoint_host - muon.checkpoint_host == pytest.approx(2 * saved, abs=4)


def test_a_rank_orthogonalises_some_matrices_at_a_time() -> None:
    config = load_config(["optim=muon", "model=mixtral_8x7b", "tracking=none", "tokenizer.vocab_size=32000"])
    largest = 4 * 4096 * 14336
    assert 2 * largest < muon_cost(config, 1).working < 8 * largest


def test_adamw_and_frozen_matrices_cost_nothing() -> None:
    assert muon_cost(composed("optim=adamw"), 2) == MuonCost()
    alone = muon_cost(composed("optim.freeze=['*.experts.*','*_proj.weight']"), 2)
    assert alone == MuonCost()

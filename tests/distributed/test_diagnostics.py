"""Diagnostics are exact over the global batch: the same on any number of ranks, engine and ZeRO stage, in training and
in evaluations, and no loss depends on them."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.sparse import SparseMLP, routers_of
from moe.train.held_out import HeldOutRouting, experts_not_finite, loss_without_experts, oddity
from moe.train.objective import training_step
from tests.distributed.training import build, config_of, micro_batches
from tests.ranks import run_ranks

STEPS = 3
TOPOLOGIES = {
    "2 ranks": (2, ["parallel.zero_stage=1"]),
    "2 ranks, ZeRO-2, expert-parallel": (2, ["parallel.zero_stage=2", "parallel.expert_parallel_size=2"]),
    "4 ranks, expert-parallel": (4, ["parallel.expert_parallel_size=2"]),
}
ROUTERS = {"top-k with capacity": ["router.capacity_factor=1.0"], "with a bias": ["router=bias", "router.rate=0.02"]}


def _train(overrides: list[str], diagnose: bool = True) -> list[dict[str, Any]]:
    config = config_of(overrides)
    mesh, engine = build(config)
    found = []
    for step in range(STEPS):
        batches = micro_batches(config, step)[mesh.rank :: mesh.world_size]
        done = training_step(config, mesh, engine, batches, step=step, lr=3e-3, diagnose=diagnose)
        found.append(done.metrics)
    return found


@cache
def _alone(router: str) -> list[dict[str, Any]]:
    return run_ranks(1, _train, [*ROUTERS[router], "engine=plain"])[0]


def _flat(value: Any) -> list[float]:
    if isinstance(value, list):
        return [one for item in value for one in _flat(item)]
    return [math.nan if value is None else float(value)]


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_step_says_the_same_on_any_topology(router: str, topology: str) -> None:
    ranks, overrides = TOPOLOGIES[topology]
    results = run_ranks(ranks, _train, [*ROUTERS[router], *overrides])
    assert all(metrics == results[0] for metrics in results), "every rank has the same metrics"
    for metrics, expected in zip(results[0], _alone(router), strict=True):
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert _flat(metrics[name]) == pytest.approx(_flat(value), rel=3e-5, abs=1e-7, nan_ok=True), name


def test_what_is_there() -> None:
    metrics = _alone("with a bias")[-1]
    for name in (
        "load_variation",
        "router_gradient_norm",
        "router_update_norm",
        "router_bias_range",
        "router_logit_max",
    ):
        assert len(metrics[f"{name}_layers"]) == 2
        assert metrics[name] > 0
    assert [len(bias_E) for bias_E in metrics["router_bias"]] == [4, 4]
    assert metrics["dropped_fraction_layers"] == [0, 0]
    assert _alone("top-k with capacity")[-1]["dropped_fraction"] > 0
    assert "router_bias" not in _alone("top-k with capacity")[-1]


def _norms(overrides: list[str]) -> list[tuple[dict[str, Any], list[float], list[float]]]:
    """A step's metrics, and each layer's gradient and update norm as torch has them."""
    config = config_of([*overrides, "engine=plain"])
    mesh, engine = build(config)
    weights = [router.get_parameter("weight") for router in routers_of(engine.model)]
    gradients: list[float] = []
    step = engine.step

    def watched(*inputs: Any) -> Any:
        gradients[:] = [float(weight.grad.norm()) for weight in weights if weight.grad is not None]
        return step(*inputs)

    engine.step = watched  # type: ignore[method-assign]
    found = []
    for number in range(STEPS):
        before = [weight.detach().clone() for weight in weights]
        batches = micro_batches(config, number)
        metrics = training_step(config, mesh, engine, batches, step=number, lr=3e-3).metrics
        moved = [float((weight - old).norm()) for weight, old in zip(weights, before, strict=True)]
        found.append((metrics, list(gradients), moved))
    return found


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_gradient_and_update_norms_are_torchs(recompute: str) -> None:
    for metrics, gradients, moved in run_ranks(1, _norms, [f"model.recompute={recompute}"])[0]:
        assert metrics["router_gradient_norm_layers"] == pytest.approx(gradients, rel=1e-6)
        assert metrics["router_update_norm_layers"] == pytest.approx(moved, rel=1e-6)
        assert min(moved) > 0


def _frozen() -> dict[str, Any]:
    config = config_of(["engine=plain"])

    def freeze(model: torch.nn.Module) -> None:
        for router in routers_of(model):
            router.requires_grad_(False)

    mesh, engine = build(config, change=freeze)
    return training_step(config, mesh, engine, micro_batches(config, 0), step=0, lr=3e-3).metrics


def test_a_frozen_router_has_no_gradient_and_no_update() -> None:
    (metrics,) = run_ranks(1, _frozen)
    assert metrics["router_gradient_norm"] == metrics["router_update_norm"] == 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_loss_depends_on_being_watched(precision: str) -> None:
    overrides = ["engine=plain", f"train.precision={precision}"]
    watched, plain = (run_ranks(1, _train, overrides, diagnose)[0] for diagnose in (True, False))
    for with_them, without in zip(watched, plain, strict=True):
        shared = {name for name, value in without.items() if value is not None}
        assert {"loss", "lm_loss", "load_balancing_loss", "expert_shares", "max_violation"} <= shared
        assert {name: with_them[name] for name in shared} == {name: without[name] for name in shared}


def _held_out(overrides: list[str]) -> tuple[dict[str, Any], Any, dict[str, Any], list[float]]:
    """Two evaluations around a training step, and the loss without each expert of the first layer."""
    config = config_of(overrides)
    mesh, engine = build(config)
    model = engine.model

    def evaluated(before: str) -> tuple[dict[str, Any], Any, str]:
        model.eval()
        held_out = HeldOutRouting(model, mesh)
        with torch.no_grad():
            for batch in micro_batches(config, 0)[mesh.rank :: mesh.world_size]:
                held_out.add(batch, model(batch.input_ids_BS).routers)
        held_out.close()
        model.train()
        return held_out.metrics(before)

    def without(places: list[tuple[int, int]]) -> list[float]:
        batch = micro_batches(config, 0)[0]  # the same on every rank
        with torch.no_grad():
            losses = loss_without_experts(model, lambda: _loss(model, batch), places)
        return [float(loss) for loss in losses]

    first, lifts, choices = evaluated("")
    for step in range(2):
        batches = micro_batches(config, step)[mesh.rank :: mesh.world_size]
        training_step(config, mesh, engine, batches, step=step, lr=3e-2)
    second, _, _ = evaluated(choices)
    return first, lifts, second, without([(0, expert) for expert in range(4)])


def _loss(model: Any, batch: Any) -> Tensor:
    return model(batch.input_ids_BS, labels_BS=batch.labels_BS).lm_loss_sum.double()


@cache
def _held_out_alone() -> Any:
    return run_ranks(1, _held_out, ["engine=plain"])[0]


@pytest.mark.parametrize("topology", ["2 ranks", "2 ranks, ZeRO-2, expert-parallel"])
def test_an_evaluation_says_the_same_on_any_topology(topology: str) -> None:
    ranks, overrides = TOPOLOGIES[topology]
    for results in run_ranks(ranks, _held_out, overrides):
        for found, expected in zip(results, _held_out_alone(), strict=True):
            if isinstance(expected, dict):
                assert found.keys() == expected.keys()
                for name, value in expected.items():
                    assert _flat(found[name]) == pytest.approx(_flat(value), rel=1e-4, abs=1e-6, nan_ok=True), name
            else:
                assert _flat(found) == pytest.approx(_flat(expected), rel=1e-4, nan_ok=True)


def test_churn_compares_with_the_evaluation_before() -> None:
    first, _, second, without = _held_out_alone()
    assert math.isnan(first["router_churn"])
    assert all(0 < churn < 1 for churn in second["router_churn_layers"])
    assert len(set(without)) == 4, "each expert left out gives another loss"


def _broken(factor: float) -> tuple[list[list[float]], list[tuple[int, int]], int]:
    config = config_of(["engine=plain"])
    mesh, engine = build(config)
    layer = [module for module in engine.model.modules() if isinstance(module, SparseMLP)][1]
    with torch.no_grad():
        layer.experts.down_proj[2] *= factor
        held_out = HeldOutRouting(engine.model, mesh)
        for batch in micro_batches(config, 0):
            held_out.add(batch, engine.model(batch.input_ids_BS).routers)
    held_out.close()
    norms = held_out.metrics("")[0]["expert_output_norm"]
    oddest = max(range(4), key=lambda expert: oddity(norms[1], expert))
    return norms, experts_not_finite(engine.model, mesh), oddest


@pytest.mark.parametrize("factor", [0.0, 30.0, math.nan])
def test_a_broken_expert_is_the_odd_one(factor: float) -> None:
    (healthy, whole, _), (norms, not_finite, oddest) = run_ranks(1, _broken, 1.0)[0], run_ranks(1, _broken, factor)[0]
    assert whole == []
    assert norms[0] == healthy[0]
    assert oddest == 2
    assert norms[1][2] == (math.inf if math.isnan(factor) else pytest.approx(factor * healthy[1][2], rel=1e-5))
    assert not_finite == ([(1, 2)] if math.isnan(factor) else [])

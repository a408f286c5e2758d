"""Metrics of a step take their names from the routers' outputs, and are exact sums over ranks and micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.config import RouterConfig, TopKRouterConfig
from moe.distributed import rendezvous
from moe.sparse import RouterOutput, max_violation
from moe.sparse.routers import RouterLoss, build_router
from moe.train.metrics import StepSums, StepTotals
from moe.train.panels import panels
from tests.bias_router.router import BiasRouterConfig
from tests.ranks import run_ranks


def _micro_batches(config: RouterConfig, rank: int) -> list[list[RouterOutput]]:
    """What the routers of two layers say to two micro-batches of a rank."""
    router = build_router(6, config)
    torch.nn.init.normal_(router.get_parameter("weight"), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(rank)
    return [[router(torch.randn(2, 8, 6, generator=generator)) for _ in range(2)] for _ in range(2)]


def _totals(config: RouterConfig | None) -> StepTotals:
    """On every rank; None: a dense model."""
    mesh = rendezvous.start(1)
    sums = StepSums(mesh)
    for routers in [[], []] if config is None else _micro_batches(config, mesh.rank):
        sums.add(torch.tensor(3.0), torch.tensor(4.0), routers)
    return sums.reduced(12, 0.5 + mesh.rank, [1.0])


def _named(routed: RouterOutput) -> dict[str, Tensor]:
    return {name: loss.value for name, loss in routed.losses.items()} | routed.diagnostics


CONFIGS = {
    "a router of one's own": BiasRouterConfig(num_experts=4),
    "top-k": TopKRouterConfig(num_experts=4),
    "top-k with capacity": TopKRouterConfig(capacity_factor=0.5),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_metrics_are_what_the_router_measured_and_what_counts_say(config: RouterConfig) -> None:
    total, other = run_ranks(2, _totals, config)
    metrics, counts = total.metrics, total.counts
    assert metrics == other.metrics
    micro_batches = [layers for rank in range(2) for layers in _micro_batches(config, rank)]
    for name in _named(micro_batches[0][0]):
        values = [[_named(routed)[name].item() for routed in layers] for layers in micro_batches]
        layers = torch.tensor(values, dtype=torch.float64).mean(0)
        assert metrics[f"{name}_layers"] == pytest.approx(layers.tolist(), rel=1e-12)
        assert metrics[name] == pytest.approx(layers.mean().item(), rel=1e-12)
        shown = panels(metrics, layers=range(2), detailed=True)
        assert shown[f"balance/{name}"] == metrics[name]
        assert shown[f"layers/{name}_01"] == metrics[f"{name}_layers"][1]
    counts_LE = torch.stack([sum(layers[layer].counts_E for layers in micro_batches) for layer in range(2)])
    assert torch.equal(torch.stack(counts), counts_LE)
    assert counts_LE.dtype == counts[0].dtype == torch.int64
    kept = sum(len(routed.choices.tokens_N) for layers in micro_batches for routed in layers)
    assert metrics["max_violation"] == pytest.approx(max_violation(counts_LE).mean().item())
    assert metrics["dead_experts"] == (counts_LE == 0).sum()
    assert metrics["dropped_fraction"] == pytest.approx(1 - kept / counts_LE.sum().item(), abs=1e-12)
    assert (metrics["loss"], metrics["lm_loss"]) == (4.0, 1.0)
    assert (total.by_rank, total.flags) == ([0.5, 1.5], [2.0])


def _without_losses() -> dict[str, Any]:
    sums = StepSums(rendezvous.start(1))
    (routers, _) = _micro_batches(TopKRouterConfig(), 0)
    for routed in routers:
        routed.losses.clear()
    sums.add(torch.tensor(3.0), torch.tensor(4.0), routers)
    return sums.reduced(12, 0.0, []).metrics


def test_the_keys_that_scripts_read_are_in_every_line() -> None:
    (total,), (sparse,) = run_ranks(1, _totals, None), run_ranks(1, _without_losses)
    dense = total.metrics
    assert total.counts == []
    assert dense["load_balancing_loss"] is dense["max_violation"] is sparse["load_balancing_loss"] is None
    assert sparse["max_violation"] > 0
    assert not any(name.endswith("_layers") for name in dense)


def _layers_that_differ() -> dict[str, Any]:
    """The first layer's router has no z-loss, the second's load-balancing loss is not finite."""
    sums = StepSums(rendezvous.start(1))
    for routers in _micro_batches(TopKRouterConfig(), 0):
        del routers[0].losses["router_z_loss"]
        routers[1].losses["load_balancing_loss"] = RouterLoss(torch.tensor(math.nan), 0.01)
        sums.add(torch.tensor(3.0), torch.tensor(4.0), routers)
    return sums.reduced(12, 0.0, []).metrics


def test_a_loss_of_some_layers_has_a_place_for_each_layer() -> None:
    (metrics,) = run_ranks(1, _layers_that_differ)
    values = [routers[1].losses["router_z_loss"].value.double() for routers in _micro_batches(TopKRouterConfig(), 0)]
    expected = pytest.approx(torch.stack(values).mean().item(), rel=1e-12)
    missing, second = metrics["router_z_loss_layers"]
    assert math.isnan(missing)
    assert second == expected
    assert metrics["router_z_loss"] == expected, "the mean of the layers that have it"
    finite, broken = metrics["load_balancing_loss_layers"]
    assert math.isfinite(finite)
    assert math.isnan(broken)
    assert math.isnan(metrics["load_balancing_loss"]), "one that is not finite shows in the mean"


ZERO = torch.zeros(())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda routed: routed.diagnostics.update(lm_loss=ZERO), "lm_loss"),
        (lambda routed: routed.losses.update(kept=RouterLoss(ZERO, 1.0)), "kept"),
        (lambda routed: routed.diagnostics.update(router_z_loss=ZERO), "router_z_loss"),
    ],
)
def test_a_name_that_would_hide_another_metric_is_a_fault(change: Callable[[RouterOutput], None], name: str) -> None:
    routers = _micro_batches(TopKRouterConfig(), 0)[0]
    change(routers[1])

    def add() -> None:
        StepSums(rendezvous.start(1)).add(torch.tensor(3.0), torch.tensor(4.0), routers)

    with pytest.raises(AssertionError, match=f"{name}.*names must differ"):
        run_ranks(1, add)

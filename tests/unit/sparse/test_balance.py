"""Balance losses: their minimum, their formulas, and that they can't be lost or fooled."""

from __future__ import annotations

import math

import pytest
import torch

from moe.config import TopKRouterConfig
from moe.sparse.balance import balance_loss, load_balancing_loss, max_violation, router_entropy, z_loss
from moe.sparse.routers.base import RouterLoss, RouterOutput
from moe.sparse.routers.topk import TopKRouter


def _value(output: RouterOutput, name: str = "load_balancing_loss") -> float:
    return output.losses[name].value.item()


def _collapsed(expert: int, experts: int = 4, tokens: int = 32) -> RouterOutput:
    """What a router that sends every token to one expert with near certainty returns."""
    config = TopKRouterConfig(num_experts=experts, top_k=1, norm_topk_prob=False, aux_loss_coef=1.0, z_loss_coef=0.0)
    router = TopKRouter(2, config)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[expert] = 20.0
    return router(torch.ones(1, tokens, 2))


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 1), (8, 2), (5, 5)])
def test_uniform_usage_scores_exactly_one(experts: int, top_k: int) -> None:
    probs_TE = torch.full((4 * experts, experts), 1 / experts)
    counts_E = torch.full((experts,), 4 * top_k)
    assert load_balancing_loss(probs_TE, counts_E).item() == pytest.approx(1.0, abs=1e-6)


def test_one_expert_for_all_scores_the_number_of_experts() -> None:
    assert _value(_collapsed(2)) == pytest.approx(4.0, rel=1e-5)


def test_layers_collapsed_onto_different_experts_are_not_scored_as_balanced() -> None:
    layers = [_collapsed(expert) for expert in range(4)]
    assert balance_loss(layers).item() == pytest.approx(4.0, rel=1e-5)  # pooled over layers it would be 1.0


def test_load_balancing_loss_is_the_double_sum_of_its_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    probs_TE = torch.rand(30, 6, generator=generator).softmax(1)
    ids_TK = probs_TE.topk(2, dim=1).indices
    expected = 0.0
    for expert in range(6):
        fraction = sum(1 for choice in ids_TK.flatten().tolist() if choice == expert) / 60
        expected += 6 * fraction * sum(probs_TE[:, expert].tolist()) / 30
    counts_E = torch.bincount(ids_TK.flatten(), minlength=6)
    assert load_balancing_loss(probs_TE, counts_E).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_pushes_the_overloaded_expert_down() -> None:
    logits_TE = torch.zeros(8, 3, requires_grad=True)
    load_balancing_loss(logits_TE.softmax(1), torch.tensor([8, 0, 0])).backward()
    assert (logits_TE.grad[:, 0] > 0).all()
    assert (logits_TE.grad[:, 1:] < 0).all()


def test_z_loss_is_the_mean_squared_logsumexp() -> None:
    logits_TE = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.5, 3.0]])
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits_TE.tolist()) / 2
    assert z_loss(logits_TE).item() == pytest.approx(expected, rel=1e-6)
    assert z_loss(torch.tensor([[300.0, 0.0]])).item() == pytest.approx(90000.0)  # no overflow


def test_total_scales_the_means_by_their_coefficients() -> None:
    router = TopKRouter(8, TopKRouterConfig(aux_loss_coef=0.5, z_loss_coef=0.25))
    outputs = [router(torch.randn(2, 16, 8)) for _ in range(3)]
    total = balance_loss(outputs, num_layers=3)
    load_balancing, z = (sum(_value(o, name) for o in outputs) / 3 for name in ("load_balancing_loss", "router_z_loss"))
    assert total.item() == pytest.approx(0.5 * load_balancing + 0.25 * z)
    total.backward()
    assert router.weight.grad.abs().sum() > 0


def test_layers_with_other_losses_and_coefficients_are_averaged_over_all_layers() -> None:
    outputs = [_collapsed(0), _collapsed(1)]
    outputs[0].losses = {"a": RouterLoss(torch.tensor(3.0), 0.5)}
    outputs[1].losses = {"a": RouterLoss(torch.tensor(5.0), 0.1), "b": RouterLoss(torch.tensor(7.0), 2.0)}
    assert balance_loss(outputs).item() == pytest.approx((0.5 * 3 + 0.1 * 5 + 2 * 7) / 2)
    for output in outputs:
        output.losses = {}
    assert balance_loss(outputs).item() == 0


def test_missing_router_outputs_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"router outputs=0 must be ≥ 1.*balance losses are lost"):
        balance_loss([])
    with pytest.raises(ValueError, match="router outputs=1 must be 2, one per sparse layer"):
        balance_loss([_collapsed(0)], num_layers=2)


def test_max_violation() -> None:
    counts_LE = torch.tensor([[3, 3, 3, 3], [12, 0, 0, 0], [6, 2, 2, 2], [0, 0, 0, 0]])
    assert max_violation(counts_LE).tolist() == [0.0, 3.0, 1.0, 0.0]


def test_entropy_is_in_nats() -> None:
    assert router_entropy(torch.full((3, 8), 1 / 8)).item() == pytest.approx(math.log(8))
    assert router_entropy(torch.eye(4)).item() == 0.0

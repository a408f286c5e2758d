"""DeepSpeed's layer with our weights: outputs and gradients agree, and its auxiliary loss where it is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.config import ExpertsConfig, TopKRouterConfig
from moe.engine.deepspeed.own_layer import DeepSpeedLayer
from moe.sparse.layer import SparseMLP, build_sparse_mlp

HIDDEN, INNER, EXPERTS = 32, 48, 8


def _layer(top_k: int) -> SparseMLP:
    torch.manual_seed(0)
    layer = build_sparse_mlp(HIDDEN, INNER, TopKRouterConfig(num_experts=EXPERTS, top_k=top_k), ExpertsConfig())
    for parameter in layer.parameters():
        parameter.data.mul_(10)  # so that outputs and routing are far from zero and from uniform
    return layer


def _inputs() -> Tensor:
    return torch.randn(3, 16, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.parametrize("top_k", [2, 3])
def test_outputs_and_gradients_are_ours(top_k: int) -> None:
    layer, x_BSH = _layer(top_k), _inputs()
    own, upstream_BSH = DeepSpeedLayer(layer), torch.randn(x_BSH.shape)
    y_BSH, _ = layer(x_BSH)
    leaves = [x_BSH, layer.gate.weight, layer.experts.gate_up_proj, layer.experts.down_proj]
    ours = torch.autograd.grad(y_BSH, leaves, upstream_BSH)
    theirs_BSH = own(x_BSH)
    to_x, *to_weights = torch.autograd.grad(theirs_BSH, [x_BSH, *own.weights], upstream_BSH)
    for found, expected in zip([theirs_BSH, to_x, *own.stacked(to_weights)], [y_BSH, *ours], strict=True):
        assert float(expected.detach().abs().max()) > 0.01
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_k", [2, 3])
def test_the_auxiliary_loss_of_two_choices_counts_the_first_only(top_k: int) -> None:
    layer, x_BSH = _layer(top_k), _inputs()
    own: Any = DeepSpeedLayer(layer)
    own(x_BSH)
    routed = layer.gate(x_BSH)
    ids_TK = routed.choices.experts_N.view(-1, top_k)
    counted_TK = ids_TK[:, :1] if top_k == 2 else ids_TK
    shares_E = torch.bincount(counted_TK.flatten(), minlength=EXPERTS) / counted_TK.numel()
    expected = EXPERTS * torch.dot(shares_E, routed.probs_TE.mean(0))
    torch.testing.assert_close(own._module.deepspeed_moe.l_aux, expected, rtol=1e-5, atol=0.0)
    same = torch.allclose(expected, routed.losses["load_balancing_loss"].value, rtol=1e-5)
    assert same == (top_k == 3)

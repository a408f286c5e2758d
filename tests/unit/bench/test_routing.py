"""Forced-uniform routing: as many rows for each expert, by the router's own weights, and only inside its block."""

from __future__ import annotations

import torch

from moe.bench.routing import even_experts, uniform_routing
from moe.config.compose import load_config
from moe.model.build import build_model
from tests.unit.bench.test_peers import SMALL


def test_a_tokens_choices_are_different_experts() -> None:
    experts_TK = even_experts(24, 8, torch.device("cpu")).view(-1, 3)
    assert all(len(set(row)) == 3 for row in experts_TK.tolist())
    assert experts_TK.flatten().bincount().tolist() == [3] * 8


def test_rows_are_even_inside_and_the_routers_own_again_outside() -> None:
    config = load_config(["model=small", "tokenizer.vocab_size=300", *SMALL])
    model = build_model(config, torch.device("cpu"))
    ids = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(0))
    own = model(ids, labels_BS=ids)
    with uniform_routing(model):
        even = model(ids, labels_BS=ids)
    again = model(ids, labels_BS=ids)
    assert own.lm_loss_sum is not None
    assert again.lm_loss_sum is not None
    assert even.lm_loss_sum is not None
    for one in even.routers:
        assert one.counts_E.tolist() == [2 * 16 * config.router.experts_per_token // 8] * 8
    assert any(one.counts_E.max() > one.counts_E.min() for one in own.routers)
    torch.testing.assert_close(even.routers[0].choices.weights_N, own.routers[0].choices.weights_N)
    assert even.lm_loss_sum != own.lm_loss_sum == again.lm_loss_sum
    even.lm_loss_sum.backward()
    gate = model.get_parameter("model.layers.0.mlp.gate.weight")
    assert gate.grad is not None
    assert gate.grad.abs().sum() > 0

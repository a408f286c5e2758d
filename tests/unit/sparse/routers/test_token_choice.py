"""Token choice: Mixtral's weights, scores, bias, losses, float32 arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moe.config import TopKRouterConfig
from tests.unit.sparse.routers.helpers import ids_of, made


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (3, 2), (8, 2), (6, 6), (13, 5)])
def test_weights_are_the_softmax_over_the_chosen_logits(experts: int, top_k: int) -> None:
    router = made(TopKRouterConfig(num_experts=experts, top_k=top_k)).double()
    x_BSH = torch.randn(2, 9, 16, dtype=torch.float64)
    routed = router(x_BSH)
    logits_TE = x_BSH.view(18, 16) @ router.weight.t()
    for token in range(18):
        best = sorted(range(experts), key=lambda e: -logits_TE[token, e].item())[:top_k]
        assert ids_of(routed)[token].tolist() == best
        weights_K = routed.choices.weights_N.view(18, top_k)[token]
        torch.testing.assert_close(weights_K, torch.softmax(logits_TE[token, best], 0))
    assert routed.choices.tokens_N.tolist() == [token for token in range(18) for _ in range(top_k)]
    torch.testing.assert_close(routed.probs_TE, logits_TE.softmax(1))
    assert routed.counts_E.tolist() == [(ids_of(routed) == e).sum().item() for e in range(experts)]
    assert routed.counts_E.dtype == routed.choices.experts_N.dtype == torch.int64
    assert routed.dropped.item() == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_arithmetic_is_float32_over_bfloat16_weights(autocast: bool) -> None:
    router = made(TopKRouterConfig(), 256).bfloat16()
    x_BSH = torch.randn(2, 64, 256).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        routed = router(x_BSH)
    exact_TE = x_BSH.double().view(128, 256) @ router.weight.double().t()
    scalars = [loss.value for loss in routed.losses.values()] + list(routed.diagnostics.values())
    for tensor in (routed.logits_TE, routed.probs_TE, routed.choices.weights_N, *scalars):
        assert tensor.dtype == torch.float32
    # bfloat16 arithmetic would be off by about 0.1 here.
    torch.testing.assert_close(routed.logits_TE.double(), exact_TE, rtol=1e-5, atol=1e-5)


def test_gradients_equal_autograd_of_the_plain_formula() -> None:
    router = made(TopKRouterConfig(num_experts=5, top_k=2)).double()
    x_BSH = torch.randn(1, 7, 16, dtype=torch.float64, requires_grad=True)
    up_TK = torch.randn(7, 2, dtype=torch.float64)
    routed = router(x_BSH)
    (routed.choices.weights_N.view(7, 2) * up_TK).sum().backward()
    ours = x_BSH.grad, router.weight.grad
    x_TH, weight = x_BSH.detach()[0].requires_grad_(), router.weight.detach().clone().requires_grad_()
    chosen_TK = F.linear(x_TH, weight).gather(1, ids_of(routed))
    (chosen_TK.softmax(1) * up_TK).sum().backward()
    torch.testing.assert_close(ours[0][0], x_TH.grad)
    torch.testing.assert_close(ours[1], weight.grad)

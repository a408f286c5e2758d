"""Router: Mixtral's weights, float32 arithmetic, capacity and what it drops."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from moe.config import DropPolicy, TopKRouterConfig
from moe.sparse.routers.base import RouterOutput
from moe.sparse.routers.topk import TopKRouter, expert_capacity, keep_choices


def _router(hidden: int = 16, **settings: object) -> TopKRouter:
    router = TopKRouter(hidden, TopKRouterConfig(**settings))
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    return router


def _ids(routed: RouterOutput) -> torch.Tensor:
    """[T, K] of a dropless router."""
    assert routed.choices.per_token is not None
    return routed.choices.experts_N.view(-1, routed.choices.per_token)


def _rows(routed: RouterOutput) -> list[tuple[int, int]]:
    """(token, expert) of every choice that was kept."""
    return list(zip(routed.choices.tokens_N.tolist(), routed.choices.experts_N.tolist(), strict=True))


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (3, 1), (3, 2), (8, 2), (6, 6), (13, 5)])
def test_weights_are_the_softmax_over_the_chosen_logits(experts: int, top_k: int) -> None:
    router = _router(num_experts=experts, top_k=top_k).double()
    x_BSH = torch.randn(2, 9, 16, dtype=torch.float64)
    routed = router(x_BSH)
    logits_TE = x_BSH.view(18, 16) @ router.weight.t()
    for token in range(18):
        best = sorted(range(experts), key=lambda e: -logits_TE[token, e].item())[:top_k]
        assert _ids(routed)[token].tolist() == best
        weights_K = routed.choices.weights_N.view(18, top_k)[token]
        torch.testing.assert_close(weights_K, torch.softmax(logits_TE[token, best], 0))
    assert routed.choices.tokens_N.tolist() == [token for token in range(18) for _ in range(top_k)]
    torch.testing.assert_close(routed.probs_TE, logits_TE.softmax(1))
    assert routed.counts_E.tolist() == [(_ids(routed) == e).sum().item() for e in range(experts)]
    assert routed.counts_E.dtype == routed.choices.experts_N.dtype == torch.int64
    assert routed.dropped.item() == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_arithmetic_is_float32_over_bfloat16_weights(autocast: bool) -> None:
    router = _router(hidden=256).bfloat16()
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
    router = _router(num_experts=5, top_k=2).double()
    x_BSH = torch.randn(1, 7, 16, dtype=torch.float64, requires_grad=True)
    up_TK = torch.randn(7, 2, dtype=torch.float64)
    routed = router(x_BSH)
    (routed.choices.weights_N.view(7, 2) * up_TK).sum().backward()
    ours = x_BSH.grad, router.weight.grad
    x_TH, weight = x_BSH.detach()[0].requires_grad_(), router.weight.detach().clone().requires_grad_()
    chosen_TK = F.linear(x_TH, weight).gather(1, _ids(routed))
    (chosen_TK.softmax(1) * up_TK).sum().backward()
    torch.testing.assert_close(ours[0][0], x_TH.grad)
    torch.testing.assert_close(ours[1], weight.grad)


@pytest.mark.parametrize(
    ("length", "experts", "top_k", "factor", "capacity"),
    [(8, 4, 2, 1.0, 4), (10, 4, 2, 1.0, 5), (10, 3, 1, 1.0, 4), (100, 1, 1, 1.1, 110), (8, 4, 2, 1e-9, 1)],
)
def test_capacity_is_the_ceiling_of_the_exact_product(
    length: int, experts: int, top_k: int, factor: float, capacity: int
) -> None:
    config = TopKRouterConfig(num_experts=experts, top_k=top_k, capacity_factor=factor)
    assert expert_capacity(length, config) == capacity


def test_a_capacity_beyond_int64_drops_nothing() -> None:
    router = _router(capacity_factor=1e37)
    assert router(torch.randn(2, 16, 16)).dropped.item() == 0


def test_position_policy_drops_the_latest_of_each_sequence() -> None:
    sequences = [[[0, 1], [0, 1], [1, 0], [0, 2]], [[2, 0], [0, 1], [2, 1], [0, 2]]]
    ids_TK = torch.tensor(sequences).view(8, 2)
    keep_TK = keep_choices(ids_TK, torch.full((8, 3), 1 / 3), 2, 2, DropPolicy.position)
    first = [[True, True], [True, True], [False, False], [False, True]]
    second = [[True, True], [True, True], [True, True], [False, False]]
    assert keep_TK.tolist() == first + second


def test_probability_policy_drops_the_least_probable_and_of_equals_the_latest() -> None:
    ids_TK = torch.tensor([[0], [0], [0], [1], [0]])
    probs_TE = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.7, 0.3]])
    keep_TK = keep_choices(ids_TK, probs_TE, 1, 2, DropPolicy.probability)
    assert keep_TK.flatten().tolist() == [False, True, True, True, False]
    # An expert's own choices come before tokens that never chose it, also at probability zero.
    zero_TE = torch.tensor([[0.0, 1.0]] * 5)
    assert keep_choices(ids_TK, zero_TE, 1, 4, DropPolicy.probability).all()


@pytest.mark.parametrize("policy", list(DropPolicy))
def test_capacity_bounds_every_expert_of_every_sequence(policy: DropPolicy) -> None:
    router = _router(num_experts=5, top_k=3, capacity_factor=0.7, drop_policy=policy)
    x_BSH = torch.randn(3, 20, 16)
    routed, whole = router(x_BSH), router.eval()(x_BSH)
    capacity = expert_capacity(20, router.config)
    demand = Counter((token // 20, expert) for token in range(60) for expert in _ids(whole)[token].tolist())
    kept = Counter((token // 20, expert) for token, expert in _rows(routed))
    assert kept == {place: min(count, capacity) for place, count in demand.items()}
    assert routed.dropped.item() == 3 * 20 * 3 - len(_rows(routed)) > 0
    assert torch.equal(routed.counts_E, whole.counts_E), "counts are the demand, before dropping"
    weight_of = dict(zip(_rows(whole), whole.choices.weights_N.tolist(), strict=True))
    assert [weight_of[row] for row in _rows(routed)] == routed.choices.weights_N.tolist(), "not renormalised"


@pytest.mark.parametrize("policy", list(DropPolicy))
def test_capacity_of_a_sequence_ignores_the_rest_of_the_batch(policy: DropPolicy) -> None:
    router = _router(num_experts=4, capacity_factor=0.8, drop_policy=policy)
    x_BSH = torch.randn(3, 16, 16)
    apart = [
        (sequence * 16 + token, expert)
        for sequence in range(3)
        for token, expert in _rows(router(x_BSH[sequence : sequence + 1]))
    ]
    assert _rows(router(x_BSH)) == apart


def test_position_policy_is_causal() -> None:
    router = _router(num_experts=4, capacity_factor=0.5)
    x_BSH = torch.randn(1, 16, 16)
    changed = x_BSH.clone()
    changed[:, 10:] = torch.randn(1, 6, 16)
    before, after = ([row for row in _rows(router(x)) if row[0] < 10] for x in (x_BSH, changed))
    assert before == after


def test_evaluation_is_dropless() -> None:
    routed = _router(capacity_factor=0.1).eval()(torch.randn(1, 32, 16))
    assert len(_rows(routed)) == 64
    assert routed.dropped.item() == 0

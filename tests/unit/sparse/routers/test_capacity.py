"""Capacity: how many choices an expert takes, and which it drops."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from moe.config import DropPolicy, TopKRouterConfig
from moe.sparse.routers.capacity import expert_capacity, keep_choices
from tests.unit.sparse.routers.helpers import ids_of, made, rows_of


@pytest.mark.parametrize(
    ("length", "experts", "top_k", "factor", "capacity"),
    [(8, 4, 2, 1.0, 4), (10, 4, 2, 1.0, 5), (10, 3, 1, 1.0, 4), (100, 4, 2, 1.1, 55), (8, 4, 2, 1e-9, 1)],
)
def test_capacity_is_the_ceiling_of_the_exact_product(
    length: int, experts: int, top_k: int, factor: float, capacity: int
) -> None:
    assert expert_capacity(length, top_k, experts, factor) == capacity


def test_a_capacity_beyond_int64_drops_nothing() -> None:
    router = made(TopKRouterConfig(capacity_factor=1e37))
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
    router = made(TopKRouterConfig(num_experts=5, top_k=3, capacity_factor=0.7, drop_policy=policy))
    x_BSH = torch.randn(3, 20, 16)
    routed, whole = router(x_BSH), router.eval()(x_BSH)
    capacity = expert_capacity(20, 3, 5, 0.7)
    demand = Counter((token // 20, expert) for token in range(60) for expert in ids_of(whole)[token].tolist())
    kept = Counter((token // 20, expert) for token, expert in rows_of(routed))
    assert kept == {place: min(count, capacity) for place, count in demand.items()}
    assert routed.dropped.item() == 3 * 20 * 3 - len(rows_of(routed)) > 0
    assert torch.equal(routed.counts_E, whole.counts_E), "counts are the demand, before dropping"
    weight_of = dict(zip(rows_of(whole), whole.choices.weights_N.tolist(), strict=True))
    assert [weight_of[row] for row in rows_of(routed)] == routed.choices.weights_N.tolist(), "not renormalised"


@pytest.mark.parametrize("policy", list(DropPolicy))
def test_capacity_of_a_sequence_ignores_the_rest_of_the_batch(policy: DropPolicy) -> None:
    router = made(TopKRouterConfig(num_experts=4, capacity_factor=0.8, drop_policy=policy))
    x_BSH = torch.randn(3, 16, 16)
    apart = [
        (sequence * 16 + token, expert)
        for sequence in range(3)
        for token, expert in rows_of(router(x_BSH[sequence : sequence + 1]))
    ]
    assert rows_of(router(x_BSH)) == apart


def test_position_policy_is_causal() -> None:
    router = made(TopKRouterConfig(num_experts=4, capacity_factor=0.5))
    x_BSH = torch.randn(1, 16, 16)
    changed = x_BSH.clone()
    changed[:, 10:] = torch.randn(1, 6, 16)
    before, after = ([row for row in rows_of(router(x)) if row[0] < 10] for x in (x_BSH, changed))
    assert before == after


def test_evaluation_is_dropless() -> None:
    routed = made(TopKRouterConfig(capacity_factor=0.1)).eval()(torch.randn(1, 32, 16))
    assert len(rows_of(routed)) == 64
    assert routed.dropped.item() == 0

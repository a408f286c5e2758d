"""Diagnostics worked by hand: four tokens, four experts, two choices a token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe.config import TopKRouterConfig
from moe.sparse.diagnostics import (
    DIAGNOSTICS,
    chosen,
    churn,
    coactivation,
    dependence,
    expert_bias,
    overlap,
    served_by_both,
)
from moe.sparse.routers import Choices, RouterOutput, build_router
from tests.bias_router.router import BiasRouterConfig

IDS_TK = torch.tensor([[0, 1], [0, 2], [0, 1], [2, 0]])  # counts 4, 2, 2, 0
WEIGHTS_TK = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
PROBS_TE = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.4, 0.1, 0.4, 0.1], [0.7, 0.1, 0.1, 0.1], [0.2, 0.1, 0.6, 0.1]])
LOGITS_TE = torch.tensor([[1.0, -1.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0], [0.0, -6.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]])
BY_HAND = {
    "max_violation": 4 / 2 - 1,
    "load_variation": math.sqrt((4 + 0 + 0 + 4) / 4) / 2,
    "load_concentration": 1.0,  # expert 0 serves every token, and no load is more uneven than that
    "dead_experts": 1,
    "dropped_fraction": 0.0,
    "router_confidence": (0.5 + 0.4 + 0.7 + 0.6) / 4,
    "router_logit_size": (2 / 4 + 2 / 4 + 6 / 4 + 2 / 4) / 4,
    "router_logit_max": 6.0,
    "first_choice_weight": 3.0 / 4.0,
    "router_entropy_of_mean": -sum(p * math.log(p) for p in (0.45, 0.15, 0.3, 0.1)) / math.log(4),
}


def _routed(choices: Choices) -> RouterOutput:
    return RouterOutput(choices, LOGITS_TE, PROBS_TE, torch.tensor([4, 2, 2, 0]), {}, {})


def _value(name: str, routed: RouterOutput) -> float:
    diagnostic = DIAGNOSTICS[name]
    return diagnostic.finish(diagnostic.measure(routed).double(), routed.choices.num_tokens).item()


def test_every_diagnostic_is_worked_by_hand() -> None:
    assert BY_HAND.keys() == DIAGNOSTICS.keys()


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    assert _value(name, _routed(Choices.top_k(IDS_TK, WEIGHTS_TK))) == pytest.approx(BY_HAND[name], rel=1e-6)


@pytest.mark.parametrize("name", BY_HAND)
def test_two_micro_batches_are_as_good_as_one(name: str) -> None:
    """What `measure` returns can be added up (or its largest taken): only then is a metric exact over the ranks."""
    halves = []
    for part in (slice(0, 2), slice(2, 4)):
        counts_E = torch.bincount(IDS_TK[part].flatten(), minlength=4)
        choices = Choices.top_k(IDS_TK[part], WEIGHTS_TK[part])
        halves.append(RouterOutput(choices, LOGITS_TE[part], PROBS_TE[part], counts_E, {}, {}))
    diagnostic = DIAGNOSTICS[name]
    one, other = (diagnostic.measure(half).double() for half in halves)
    both = torch.maximum(one, other) if diagnostic.largest else one + other
    assert diagnostic.finish(both, 4).item() == pytest.approx(BY_HAND[name], rel=1e-6)


def test_dropped_choices_count_as_demand_and_as_dropped() -> None:
    keep_TK = torch.tensor([[True, True], [False, True], [False, False], [True, True]])
    routed = _routed(Choices.top_k(IDS_TK, WEIGHTS_TK, keep_TK))
    assert _value("dropped_fraction", routed) == 3 / 8
    assert _value("max_violation", routed) == 1.0
    # A token's first choice is the best that it kept: 0.9 and 0.1, then 0.2, nothing, 0.6 and 0.4.
    assert _value("first_choice_weight", routed) == pytest.approx((0.9 + 0.2 + 0.6) / 2.2)


@pytest.mark.parametrize(
    ("counts", "tokens", "expected"),
    [([4, 4, 4, 4], 8, 0.0), ([8, 8, 0, 0], 8, 1.0), ([8, 4, 4, 0], 8, 1.0), ([8, 0, 0, 0], 8, 1.0), ([5, 5], 5, 0.0)],
)
def test_load_concentration_is_1_where_an_expert_serves_every_token(
    counts: list[int], tokens: int, expected: float
) -> None:
    finish = DIAGNOSTICS["load_concentration"].finish
    assert finish(torch.tensor(counts).double(), tokens).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("probability", "expected"), [([1, 1, 1, 1], 1.0), ([9, 0, 0, 0], 0.0), ([1, 1, 0, 0], 0.5)])
def test_entropy_of_the_mean_is_a_share_of_the_largest(probability: list[float], expected: float) -> None:
    value = DIAGNOSTICS["router_entropy_of_mean"].finish(torch.tensor(probability, dtype=torch.float64), 9)
    assert value.item() == pytest.approx(expected)


def test_a_bias_is_found_by_its_name_and_shape() -> None:
    router = build_router(6, BiasRouterConfig(num_experts=4))
    assert expert_bias(router) is router.bias
    assert expert_bias(build_router(6, TopKRouterConfig())) is None


def _chosen(ids_TK: list[list[int]]) -> Tensor:
    ids = torch.tensor(ids_TK)
    return chosen(Choices.top_k(ids, torch.ones(ids.shape)), 3)


def test_coactivation_is_the_lift_over_independent_choices() -> None:
    chosen_TE = _chosen([[0, 1], [0, 1], [0, 2], [1, 2]])
    pairs_EE = served_by_both(chosen_TE, chosen_TE)
    assert pairs_EE.tolist() == [[3, 2, 1], [2, 3, 1], [1, 1, 2]]
    lift_EE = coactivation(pairs_EE, 4)
    assert lift_EE[0, 1].item() == pytest.approx((2 / 4) / (3 / 4 * 3 / 4))
    assert lift_EE[2, 0].item() == pytest.approx((1 / 4) / (2 / 4 * 3 / 4))
    assert lift_EE.diagonal().isnan().all()


def test_overlap_counts_equal_numbers_and_dependence_doesnt_care_about_them() -> None:
    one = _chosen([[0], [1], [2], [0], [1], [2]])
    other = _chosen([[1], [2], [0], [1], [2], [0]])  # the same choices under other numbers
    same, moved = served_by_both(one, one), served_by_both(one, other)
    assert overlap(same, 6).item() == 1.0
    assert overlap(moved, 6).item() == 0.0
    assert dependence(same).item() == pytest.approx(math.log(3))
    assert dependence(moved).item() == pytest.approx(math.log(3))
    alike = served_by_both(one, _chosen([[0], [0], [0], [1], [1], [1]]))
    assert dependence(alike).item() == pytest.approx(0.0, abs=1e-12)


def test_churn_is_the_share_of_choices_that_are_others() -> None:
    before, after = _chosen([[0, 1], [1, 2], [0, 2]]), _chosen([[0, 1], [0, 1], [1, 0]])
    assert churn(before, before).item() == 0.0
    assert churn(before, after).item() == pytest.approx(2 / 6)

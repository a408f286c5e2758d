"""Group-limited choice, worked by hand."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

from moe.config import BiasUpdate, GroupLimitedRouterConfig, ScoringFunction
from tests.unit.sparse.routers.helpers import checked_gradients, ids_of, made, weights_of, with_logits


def config(**options: Any) -> GroupLimitedRouterConfig:
    return GroupLimitedRouterConfig(**{"num_experts": 6, "n_group": 3, "topk_group": 1, **options})


def test_a_token_stays_in_its_best_group_though_the_best_expert_is_outside() -> None:
    """Groups {0 1}, {2 3}, {4 5} score 5.0, 5.1 and 4.8: expert 0 has the highest logit but group 1 wins."""
    router = with_logits(config(scoring_func=ScoringFunction.sigmoid))
    scores = torch.tensor([[[0.90, 0.10], [0.60, 0.50], [0.55, 0.40]]])
    routed = router(scores.view(1, 1, 6).logit())
    assert ids_of(routed).tolist() == [[2, 3]]
    torch.testing.assert_close(weights_of(routed), torch.tensor([[0.60 / 1.10, 0.50 / 1.10]]))
    two = with_logits(config(scoring_func=ScoringFunction.sigmoid, topk_group=2))(scores.view(1, 1, 6).logit())
    assert ids_of(two).tolist() == [[0, 2]], "the best of groups 0 and 1"


def test_the_bias_chooses_groups_too() -> None:
    router = with_logits(config(scoring_func=ScoringFunction.sigmoid, bias_update=BiasUpdate.sign))
    router.e_score_correction_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.5]))
    scores = torch.tensor([0.90, 0.10, 0.60, 0.50, 0.55, 0.40])
    routed = router(scores.view(1, 1, 6).logit())
    assert ids_of(routed).tolist() == [[5, 4]]
    torch.testing.assert_close(weights_of(routed), torch.tensor([[0.40 / 0.95, 0.55 / 0.95]]))


def test_negative_biases_still_keep_choices_in_the_groups() -> None:
    router = with_logits(config(scoring_func=ScoringFunction.sigmoid, bias_update=BiasUpdate.sign))
    router.e_score_correction_bias.fill_(-9.0)
    routed = router(torch.tensor([[[0.1, 0.2, 3.0, 2.0, 0.3, 0.1]]]))
    assert ids_of(routed).tolist() == [[2, 3]]


def test_equals_the_best_over_all_sets_of_groups() -> None:
    router = made(config(num_experts=12, n_group=4, topk_group=2, top_k=3)).double()
    routed = router(torch.randn(1, 40, 16, dtype=torch.float64))
    for token, scores_E in enumerate(routed.probs_TE):
        value = [scores_E[3 * group : 3 * group + 3].topk(2).values.sum() for group in range(4)]
        chosen = max(combinations(range(4), 2), key=lambda pair, value=value: value[pair[0]] + value[pair[1]])
        there = [3 * group + one for group in chosen for one in range(3)]
        best = sorted(there, key=lambda expert, scores=scores_E: -scores[expert])[:3]
        assert ids_of(routed)[token].tolist() == best


@pytest.mark.parametrize("scoring", list(ScoringFunction))
def test_gradients_equal_finite_differences(scoring: ScoringFunction) -> None:
    router = made(config(scoring_func=scoring, sequence_aux_loss_coef=1.0, routed_scaling_factor=2.5), 5)
    checked_gradients(router, torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1)))

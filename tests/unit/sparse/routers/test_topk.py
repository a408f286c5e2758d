"""The top-k router's parts, worked by hand: scores, weights, bias, losses, capacity, jitter, schedules, gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moe.config import BiasUpdate, DropPolicy, ScoringFunction, TopKRouterConfig
from moe.config.compose import load_config
from moe.sparse.routers import Router, RouterOutput
from tests.unit.sparse.routers.helpers import checked_gradients, ids_of, made, noise, rows_of, weights_of, with_logits

LOGITS = torch.tensor([[[0.0, math.log(2), math.log(4), math.log(3)], [math.log(9), 0.0, 0.0, math.log(5)]]])


def config(**options: Any) -> TopKRouterConfig:
    return TopKRouterConfig(num_experts=4, **options)


def loss(routed: RouterOutput, name: str) -> float:
    return routed.losses[name].value.item()


def closely(values: object) -> Any:
    return pytest.approx(values, rel=1e-6)


def flat(routed: RouterOutput) -> list[float]:
    return weights_of(routed).flatten().tolist()


def test_softmax_renormalised_plain_and_scaled() -> None:
    routed = with_logits(config())(LOGITS)
    assert ids_of(routed).tolist() == [[2, 3], [0, 3]]
    assert flat(routed) == closely([4 / 7, 3 / 7, 9 / 14, 5 / 14])
    plain = with_logits(config(norm_topk_prob=False))(LOGITS)
    assert flat(plain) == closely([4 / 10, 3 / 10, 9 / 16, 5 / 16])
    assert flat(with_logits(config(norm_topk_prob=False, routed_scaling_factor=2.5))(LOGITS)) == closely(
        [1.0, 0.75, 22.5 / 16, 12.5 / 16]
    )


def test_sigmoid_renormalised_plain_and_scaled() -> None:
    """The sigmoid of ln a is a / (1 + a)."""
    sigmoid = ScoringFunction.sigmoid
    routed = with_logits(config(scoring_func=sigmoid))(LOGITS)
    assert ids_of(routed).tolist() == [[2, 3], [0, 3]]
    four_fifths, three_quarters = 4 / 5, 3 / 4
    whole = four_fifths + three_quarters
    assert flat(routed)[:2] == closely([four_fifths / whole, three_quarters / whole])
    plain = with_logits(config(scoring_func=sigmoid, norm_topk_prob=False, routed_scaling_factor=2.0))(LOGITS)
    assert flat(plain) == closely([8 / 5, 6 / 4, 18 / 10, 10 / 6])
    scores = [1 / 2, 2 / 3, 4 / 5, 3 / 4]
    assert routed.probs_TE[0].tolist() == closely([score / sum(scores) for score in scores])


def test_sigmoid_scores_that_all_underflow_give_finite_weights() -> None:
    router = with_logits(config(scoring_func=ScoringFunction.sigmoid))
    routed = router(torch.full((1, 2, 4), -300.0))
    assert routed.choices.weights_N.isfinite().all()
    assert routed.probs_TE.isfinite().all()


def test_the_bias_acts_on_the_choice_only() -> None:
    router = with_logits(config(scoring_func=ScoringFunction.sigmoid, bias_update=BiasUpdate.sign))
    router.e_score_correction_bias.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    routed = router(LOGITS)
    assert ids_of(routed).tolist() == [[1, 2], [1, 0]], "expert 1 first, whose biased score is the highest"
    two_thirds, four_fifths = 2 / 3, 4 / 5
    assert flat(routed)[:2] == closely(
        [two_thirds / (two_thirds + four_fifths), four_fifths / (two_thirds + four_fifths)]
    )
    assert torch.equal(routed.probs_TE, with_logits(router.config)(LOGITS).probs_TE)


COUNTS = torch.tensor([10, 2, 4, 4])  # mean 5


@pytest.mark.parametrize(
    ("update", "expected"),
    [(BiasUpdate.sign, [-0.1, 0.1, 0.1, 0.1]), (BiasUpdate.proportional, [-0.1, 0.06, 0.02, 0.02])],
)
def test_the_bias_moves_towards_experts_with_few_choices(update: BiasUpdate, expected: list[float]) -> None:
    router = made(config(bias_update=update, bias_update_rate=0.1))
    router.after_step(COUNTS)
    assert router.e_score_correction_bias.tolist() == closely(expected)
    router.after_step(COUNTS)
    assert router.e_score_correction_bias.tolist() == closely([2 * value for value in expected])
    before = router.e_score_correction_bias.clone()
    router.after_step(torch.tensor([5, 5, 5, 5]))
    router.after_step(torch.zeros(4, dtype=torch.int64))
    assert torch.equal(router.e_score_correction_bias, before)
    router.reset_buffers()
    assert router.e_score_correction_bias.count_nonzero() == 0


def test_without_an_update_there_is_no_bias() -> None:
    router = made(config())
    router.after_step(COUNTS)
    assert not list(router.buffers())


def test_a_frozen_routers_bias_and_weights_stay() -> None:
    router = made(config(bias_update=BiasUpdate.sign, freeze_first_steps=2, freeze_last_steps=1))
    moved = []
    for step in range(6):
        router.begin_step(step, 6)
        router.zero_grad()
        before = router.e_score_correction_bias.clone()
        routed = router(torch.randn(1, 8, 16))
        (routed.choices.weights_N[::2].sum() + routed.losses["load_balancing_loss"].value).backward()
        router.after_step(COUNTS)
        assert router.weight.grad is not None, "a missing gradient could not be reduced"
        moved.append(
            (bool(router.weight.grad.count_nonzero()), not torch.equal(before, router.e_score_correction_bias))
        )
    assert moved == [(False, False)] * 2 + [(True, True)] * 3 + [(False, False)]


def test_losses_worked_by_hand() -> None:
    """Two sequences of one token: probabilities [.1 .2 .4 .3] and [9 1 1 5]/16, choices {2, 3} and {0, 3}."""
    router = with_logits(config(sequence_aux_loss_coef=0.1, variance_loss_coef=0.2, global_aux_loss_coef=0.3))
    routed = router(LOGITS.view(2, 1, 4))
    first, second = [0.1, 0.2, 0.4, 0.3], [9 / 16, 1 / 16, 1 / 16, 5 / 16]
    mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    in_batch = 4 * (1 / 4 * mean[0] + 1 / 4 * mean[2] + 2 / 4 * mean[3])
    assert loss(routed, "load_balancing_loss") == closely(in_batch)
    assert loss(routed, "global_balancing_loss") == closely(in_batch), "until it is told another count"
    in_sequences = [4 * 1 / 2 * (first[2] + first[3]), 4 * 1 / 2 * (second[0] + second[3])]
    assert loss(routed, "sequence_balancing_loss") == closely(sum(in_sequences) / 2)
    assert loss(routed, "usage_variance") == closely(sum((share - 1 / 4) ** 2 for share in mean))
    assert loss(routed, "router_z_loss") == closely((math.log(10) ** 2 + math.log(16) ** 2) / 2)
    assert {name: one.coefficient for name, one in routed.losses.items()} == {
        "load_balancing_loss": 0.02, "sequence_balancing_loss": 0.1, "global_balancing_loss": 0.3,
        "usage_variance": 0.2, "router_z_loss": 0.001,
    }  # fmt: skip


def test_the_global_loss_weighs_with_the_counts_of_the_whole_batch() -> None:
    router = with_logits(config(global_aux_loss_coef=0.3))
    assert router.counts_global_batch
    assert not with_logits(config()).counts_global_batch
    router.global_counts_E = torch.tensor([6, 2, 0, 0])
    routed = router(LOGITS[:, :1])
    assert loss(routed, "global_balancing_loss") == closely(4 * (6 / 8 * 0.1 + 2 / 8 * 0.2))
    assert loss(routed, "load_balancing_loss") == closely(4 * (1 / 2 * 0.4 + 1 / 2 * 0.3))


def test_the_mean_of_micro_batches_global_losses_is_the_whole_batchs() -> None:
    router = made(config(global_aux_loss_coef=1.0, aux_loss_coef=0.0))
    x_BSH = torch.randn(4, 8, 16)
    whole = router(x_BSH)
    whole.losses["load_balancing_loss"].value.backward()
    expected, router.global_counts_E = router.weight.grad.clone(), whole.counts_E
    router.zero_grad()
    parts = [router(part).losses["global_balancing_loss"].value for part in x_BSH.split(1)]
    (sum(parts) / 4).backward()
    assert torch.stack(parts).mean().item() == closely(loss(whole, "load_balancing_loss"))
    torch.testing.assert_close(router.weight.grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (DropPolicy.position, [(0, 0), (0, 1), (1, 0), (1, 1)]),
        (DropPolicy.probability, [(0, 0), (1, 1), (2, 0), (2, 1)]),
    ],
)
def test_capacity_goes_by_position_or_by_the_sigmoid_score(policy: DropPolicy, kept: list[tuple[int, int]]) -> None:
    """Three tokens choose experts 0 and 1, of which each takes ceil(3 · 2 / 4 · 1.2) = 2. By score: expert 0 keeps its
    tokens 2 and 0, expert 1 its tokens 2 and 1."""
    router = with_logits(
        config(scoring_func=ScoringFunction.sigmoid, capacity_factor=1.2, drop_policy=policy)
    )  # fmt: skip
    routed = router(torch.tensor([[[2.0, 1.0, -9.0, -9.0], [1.0, 2.0, -9.0, -9.0], [3.0, 4.0, -9.0, -9.0]]]))
    assert sorted(rows_of(routed)) == kept
    assert routed.dropped.item() == 2
    assert routed.counts_E.tolist() == [3, 3, 0, 0]


def test_jitter_multiplies_the_input_by_at_most_epsilon() -> None:
    router = with_logits(config(jitter_noise=0.1))
    x_BSH = torch.ones(2, 64, 4)
    routed = router(x_BSH, noise(2))
    assert routed.logits_TE.min() < 0.92
    assert routed.logits_TE.max() > 1.08
    assert ((routed.logits_TE - 1).abs() <= 0.1 + 1e-6).all()
    assert torch.equal(router.eval()(x_BSH).logits_TE, x_BSH.flatten(0, 1))


def test_top_k_coefficients_and_rate_follow_their_schedules() -> None:
    router = with_logits(
        config(
            bias_update=BiasUpdate.sign,
            schedules={
                "top_k": {0: 3, 10: 2},
                "aux_loss_coef": {0: 0.1, 10: 0.0},
                "bias_update_rate": {0: 1.0, 10: 0.5},
            },
        )
    )
    seen = []
    for step in (0, 5, 9, 10, 99):
        router.begin_step(step, 100)
        routed = router(LOGITS)
        router.reset_buffers()
        router.after_step(COUNTS)
        moved = router.e_score_correction_bias[1].item()
        router.reset_buffers()
        seen.append((routed.choices.per_token, routed.losses["load_balancing_loss"].coefficient, moved))
    assert seen == [
        (3, 0.1, 1.0), (3, closely(0.05), 0.75), (3, closely(0.01), closely(0.55)), (2, 0.0, 0.5), (2, 0.0, 0.5),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "preset", ["mixtral", "lossfree", "switch", "gshard", "st_moe", "olmoe", "qwen3_moe", "topk"]
)  # fmt: skip
def test_gradients_of_every_preset_equal_finite_differences(preset: str) -> None:
    more = ["router.num_experts=8", *(["router.top_k=3"] if preset in ("olmoe", "qwen3_moe") else [])]
    router: Router = made(load_config([f"router={preset}", *more]).router, 6)
    generator = torch.Generator().manual_seed(0)
    checked_gradients(router, torch.randn(2, 3, 6, generator=generator), noise(2))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("scoring", list(ScoringFunction))
def test_gradients_of_all_losses_equal_finite_differences(scoring: ScoringFunction, norm: bool) -> None:
    options = config(
        scoring_func=scoring, norm_topk_prob=norm, routed_scaling_factor=2.5, sequence_aux_loss_coef=1.0,
        global_aux_loss_coef=1.0, variance_loss_coef=1.0, bias_update=BiasUpdate.proportional,
    )  # fmt: skip
    router = made(options, 6)
    router.e_score_correction_bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.1]))
    router.global_counts_E = torch.tensor([5, 1, 1, 1])
    checked_gradients(router, torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0)))

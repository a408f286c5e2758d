"""Gumbel top-k: a sample of the experts by their probabilities, sharpened by the temperature."""

from __future__ import annotations

import math

import pytest
import torch

from moe.config import GumbelRouterConfig
from moe.sparse.randomness import Randomness
from moe.sparse.routers.token_choice import NOISE
from tests.unit.sparse.routers.helpers import checked_gradients, ids_of, made, noise, with_logits


def test_scores_are_the_logits_plus_gumbel_noise_over_the_temperature() -> None:
    router = with_logits(GumbelRouterConfig(num_experts=4, temperature=0.5))
    x_BSH = torch.randn(2, 5, 4)
    routed = router(x_BSH, noise(2))
    noisy_TE = ((x_BSH + noise(2).fork(NOISE).gumbel(5, 4)) / 0.5).flatten(0, 1)
    torch.testing.assert_close(routed.probs_TE, noisy_TE.softmax(1))
    assert ids_of(routed).tolist() == noisy_TE.topk(2).indices.tolist()
    evaluated = router.eval()(x_BSH)
    torch.testing.assert_close(evaluated.probs_TE, (x_BSH.flatten(0, 1) / 0.5).softmax(1))


def test_the_noise_must_be_given_and_is_a_samples_own() -> None:
    router, x_BSH = made(GumbelRouterConfig(num_experts=4)), torch.randn(2, 5, 16)
    with pytest.raises(ValueError, match="needs the batch's randomness"):
        router(x_BSH)
    whole = router(x_BSH, noise(2)).probs_TE
    assert torch.equal(whole, router(x_BSH, noise(2)).probs_TE)
    second = Randomness.of(0, 0, torch.tensor([1]))
    assert torch.equal(whole[5:], router(x_BSH[1:], second).probs_TE)
    assert not torch.equal(whole, router(x_BSH, noise(2).fork(1)).probs_TE)


def test_gumbel_noise_has_its_mean_and_variance() -> None:
    values = Randomness.of(0, 0, torch.arange(64)).gumbel(4096).double()
    variance, count = math.pi**2 / 6, values.numel()
    assert values.isfinite().all()
    assert values.mean() == pytest.approx(0.5772157, abs=5 * math.sqrt(variance / count))
    assert values.var() == pytest.approx(variance, rel=0.02)
    assert (values < 0).double().mean() == pytest.approx(math.exp(-1), abs=0.005)


def test_first_choices_follow_the_probabilities_and_pairs_are_without_replacement() -> None:
    """P(first = i) = p_i; P(second = j | first = i) = p_j / (1 − p_i) (Plackett–Luce)."""
    router = with_logits(GumbelRouterConfig(num_experts=3))
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    tokens = 40_000
    ids_TK = ids_of(router(probabilities.log().expand(8, tokens // 8, 3), noise(8)))
    first_E = torch.bincount(ids_TK[:, 0], minlength=3) / tokens
    torch.testing.assert_close(first_E, probabilities, rtol=0, atol=0.013)  # 5 standard deviations
    after_0 = ids_TK[ids_TK[:, 0] == 0, 1]
    assert (after_0 == 1).float().mean() == pytest.approx(0.3 / 0.5, abs=0.02)


def test_the_temperature_is_annealed_over_steps() -> None:
    router = with_logits(GumbelRouterConfig(num_experts=4, schedules={"temperature": {0: 2.0, 100: 0.5}})).eval()
    x_BSH = torch.randn(1, 6, 4)
    entropies = []
    for step, temperature in ((0, 2.0), (50, 1.25), (100, 0.5), (500, 0.5)):
        router.begin_step(step, 1000)
        routed = router(x_BSH)
        torch.testing.assert_close(routed.probs_TE, (x_BSH[0] / temperature).softmax(1))
        entropies.append(routed.diagnostics["router_entropy"].item())
    assert entropies[0] > entropies[1] > entropies[2] == entropies[3]


def test_gradients_equal_finite_differences() -> None:
    router = made(GumbelRouterConfig(num_experts=4, temperature=0.7, sequence_aux_loss_coef=1.0), 5)
    checked_gradients(router, torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2)), noise(2))

"""Noisy top-k: noise of the learnt deviation, in training only, the same for the same sample."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from moe.config import NoisyTopKRouterConfig
from moe.sparse.randomness import Randomness
from moe.sparse.routers.token_choice import NOISE
from tests.unit.sparse.routers.helpers import checked_gradients, ids_of, made, noise, with_logits


def config(**options: float) -> NoisyTopKRouterConfig:
    return NoisyTopKRouterConfig(num_experts=4, **options)


def test_scores_are_the_logits_plus_noise_times_softplus() -> None:
    """Both weights are the identity, so the deviation is softplus(x)."""
    router, x_BSH = with_logits(config(noise_std=0.5)), torch.randn(2, 5, 4)
    routed = router(x_BSH, noise(2))
    normal_BSE = noise(2).fork(NOISE).normal(5, 4)
    noisy_TE = (x_BSH + 0.5 * normal_BSE * F.softplus(x_BSH)).flatten(0, 1)
    torch.testing.assert_close(routed.probs_TE, noisy_TE.softmax(1))
    assert ids_of(routed).tolist() == noisy_TE.topk(2).indices.tolist()
    assert torch.equal(routed.logits_TE, x_BSH.flatten(0, 1)), "the z-loss sees the logits without noise"


def test_noise_only_in_training_where_it_must_be_given() -> None:
    router, x_BSH = made(config()), torch.randn(2, 5, 16)
    with pytest.raises(ValueError, match=r"router.noise_std=1.0 needs the batch's randomness"):
        router(x_BSH)
    trained = router(x_BSH, noise(2))
    evaluated = router.eval()(x_BSH)
    torch.testing.assert_close(evaluated.probs_TE, evaluated.logits_TE.softmax(1))
    assert not torch.equal(trained.probs_TE, evaluated.probs_TE)
    assert torch.equal(router(x_BSH, noise(2)).probs_TE, evaluated.probs_TE)


def test_the_noise_of_a_sample_is_its_own() -> None:
    router, x_BSH = made(config()), torch.randn(3, 5, 16)
    samples = torch.tensor([7, 8, 9])

    def probs(ids: torch.Tensor, x: torch.Tensor, seed: int = 0, step: int = 3, layer: int = 1) -> torch.Tensor:
        return router(x, Randomness.of(seed, step, ids).fork(layer)).probs_TE.view(len(ids), 5, 4)

    whole = probs(samples, x_BSH)
    assert torch.equal(whole, probs(samples, x_BSH))
    # Whatever else is in the batch. A product of other rows may round otherwise.
    torch.testing.assert_close(whole[1:2], probs(samples[1:2], x_BSH[1:2]), rtol=1e-5, atol=1e-9)
    for other in ({"seed": 1}, {"step": 4}, {"layer": 2}):
        assert not torch.equal(whole, probs(samples, x_BSH, **other))


def test_the_normal_noise_has_its_mean_variance_and_tails() -> None:
    values = Randomness.of(0, 0, torch.arange(64)).normal(4096).double()
    count = values.numel()
    assert abs(values.mean()) < 5 / math.sqrt(count)
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / count)
    for bound, share in ((1.0, 0.841345), (2.0, 0.977250), (-1.5, 0.066807)):
        assert (values < bound).double().mean() == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / count))


def test_a_standard_deviation_of_0_leaves_a_gradient_of_zero_and_not_none() -> None:
    """A schedule may end at 0; ZeRO can't reduce a gradient that is missing."""
    router = made(NoisyTopKRouterConfig(num_experts=4, schedules={"noise_std": {0: 1.0, 10: 0.0}}))
    x_BSH = torch.randn(2, 5, 16)
    for step, moves in ((0, True), (10, False)):
        router.begin_step(step, 20)
        router.zero_grad()
        routed = router(x_BSH, noise(2))
        (routed.choices.weights_N[::2].sum()).backward()
        assert router.noise_weight.grad is not None
        assert bool(router.noise_weight.grad.count_nonzero()) == moves
    torch.testing.assert_close(routed.probs_TE, routed.logits_TE.softmax(1))


def test_gradients_equal_finite_differences() -> None:
    checked_gradients(made(config(), 5), torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2)), noise(2))

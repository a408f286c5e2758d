"""Muon against its formulas in float64, and against torch's own for single matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe.config.optim import ITERATIONS
from moe.engine.muon import COEFFICIENTS, Muon, OwnMatrices, orthogonalized

LR, DECAY, MOMENTUM = 1e-2, 0.1, 0.95
SHAPES = [(48, 32), (32, 48), (32, 32), (1, 7)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_singular_values(matrix_OI: Tensor) -> Tensor:
    """The quintic applied to each singular value, float64: no product of the iteration is used."""
    a, b, c = COEFFICIENTS
    left, values, right = torch.linalg.svd(matrix_OI.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(ITERATIONS):
        values = a * values + b * values**3 + c * values**5
    return (left * values) @ right


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_it_is_the_quintic_of_the_singular_values(rows: int, columns: int) -> None:
    u_NOI = random(3, rows, columns)
    for u_OI, found_OI in zip(u_NOI, orthogonalized(u_NOI), strict=True):
        expected = by_singular_values(u_OI)
        assert (found_OI - expected).norm() <= 2e-5 * expected.norm()


def test_a_matrix_of_few_directions_keeps_them() -> None:
    """As an expert's gradient, if few tokens came. Rounding adds directions of 1e-8 that the steps enlarge by 485."""
    u_OI = random(64, 3) @ random(3, 48, seed=1)
    expected = by_singular_values(u_OI)
    found_OI = orthogonalized(u_OI[None])[0]
    assert (found_OI - expected).norm() <= 1e-4 * expected.norm()
    assert torch.linalg.matrix_rank(found_OI, rtol=1e-3) == 3


def test_singular_values_come_near_1() -> None:
    values = torch.logspace(math.log10(1 / 480), 0, 200, dtype=torch.float64)
    for other in values[:-1]:  # a matrix of norm 1 with the singular value `other`
        rest = math.sqrt(1 - float(other) ** 2)
        found = torch.linalg.svdvals(orthogonalized(torch.diag(torch.tensor([float(other), rest]))[None])[0])
        assert float(found.min()) >= 0.68, other
        assert float(found.max()) <= 1.21, other


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e6])
def test_the_size_of_the_gradient_does_not_matter(scale: float) -> None:
    u_NOI = random(2, 48, 32)
    torch.testing.assert_close(orthogonalized(u_NOI * scale), orthogonalized(u_NOI), rtol=1e-3, atol=1e-4)


def test_no_gradient_is_no_update() -> None:
    assert torch.equal(orthogonalized(torch.zeros(2, 48, 32)), torch.zeros(2, 48, 32))
    assert float(orthogonalized(random(1, 48, 32) * 1e-20).norm()) < 1e-8


def test_bfloat16_steps_stay_near() -> None:
    """What a GPU computes with train.precision=bfloat16; the relative error that docs/optimizers.md states."""
    u_NOI = random(4, 96, 64)
    gap = (orthogonalized(u_NOI, torch.bfloat16) - orthogonalized(u_NOI)).norm() / orthogonalized(u_NOI).norm()
    assert 1e-4 < float(gap) < 3e-2


def muon(weight: Tensor, shape: tuple[int, int]) -> Muon:
    made = Muon(
        [{"params": [weight], "muon": True, "weight_decay": DECAY}], lr=LR, momentum=MOMENTUM, dtype=torch.float32
    )
    made.matrices[weight] = OwnMatrices(weight, shape)
    return made


def after_steps(weight: Tensor, shape: tuple[int, int], gradients: list[Tensor]) -> Tensor:
    weight = weight.clone()
    optimizer = muon(weight, shape)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_steps_are_those_of_the_formula(rows: int, columns: int) -> None:
    weight, gradients = random(rows, columns), [random(rows, columns, seed=seed) for seed in (1, 2, 3)]
    expected, momentum = weight.double(), torch.zeros(rows, columns, dtype=torch.float64)
    for gradient in gradients:
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient.double()
        update = by_singular_values(MOMENTUM * momentum + (1 - MOMENTUM) * gradient.double())
        expected = (1 - LR * DECAY) * expected - LR * 0.2 * math.sqrt(max(rows, columns)) * update
    found = after_steps(weight, (rows, columns), gradients)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


def test_torchs_own_agrees_for_a_matrix() -> None:
    """It computes in bfloat16, which is the tolerance."""
    weight, gradients = random(48, 32), [random(48, 32, seed=seed) for seed in (1, 2, 3)]
    theirs = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.Muon([theirs], lr=LR, weight_decay=DECAY, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        theirs.grad = gradient.clone()
        optimizer.step()
    ours = after_steps(weight, (48, 32), gradients)
    moved = (ours - weight).norm()
    assert (ours - theirs.detach()).norm() <= 2e-2 * moved


def test_stacked_matrices_are_each_updated_alone() -> None:
    """Two experts' gate and up, which are stored together: four matrices."""
    weight, gradients = random(2, 2 * 16, 24), [random(2, 2 * 16, 24, seed=seed) for seed in (1, 2)]
    found = after_steps(weight, (16, 24), gradients).view(4, 16, 24)
    for index, one in enumerate(found):
        alone = after_steps(
            weight.view(4, 16, 24)[index], (16, 24), [gradient.view(4, 16, 24)[index] for gradient in gradients]
        )
        torch.testing.assert_close(one, alone, rtol=1e-5, atol=1e-6)


def test_many_matrices_are_updated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gradients = random(5, 16, 24), [random(5, 16, 24, seed=1)]
    expected = after_steps(weight, (16, 24), gradients)
    monkeypatch.setattr("moe.engine.muon.MOST_ELEMENTS", 2 * 16 * 24)
    torch.testing.assert_close(after_steps(weight, (16, 24), gradients), expected, rtol=1e-5, atol=1e-6)


def test_the_other_groups_are_adamws() -> None:
    weight, vector, gradient = random(6, 4), random(5), random(5, seed=1)
    ours, theirs = vector.clone(), vector.clone()
    optimizer = Muon(
        [
            {"params": [weight], "muon": True, "weight_decay": DECAY},
            {"params": [ours], "muon": False, "weight_decay": 0.0},
        ],
        lr=LR, momentum=MOMENTUM, dtype=torch.float32, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    optimizer.matrices[weight] = OwnMatrices(weight, (6, 4))
    reference = torch.optim.AdamW([theirs], lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for _ in range(2):
        weight.grad, ours.grad, theirs.grad = random(6, 4), gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    assert torch.equal(ours, theirs)
    assert [sorted(optimizer.state[one]) for one in (weight, ours)] == [
        ["momentum_buffer"],
        ["exp_avg", "exp_avg_sq", "step"],
    ]

"""The global batch's balance loss equals the ordinary one of a single micro-batch that holds the whole batch."""

from __future__ import annotations

import pytest
import torch

from moe.train.objective import training_step
from tests.distributed.training import build, config_of, joined, micro_batches
from tests.ranks import run_ranks

STEPS, COEFFICIENT = 6, 0.5
NO_LOSS = ["router.aux_loss_coef=0", "router.z_loss_coef=0", "engine=plain"]


def _steps(overrides: list[str], whole: bool) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Gradient norms, load-balancing losses and last weights."""
    config = config_of([*NO_LOSS, *overrides])
    cut = config_of([one for one in overrides if one.startswith("data")])
    mesh, engine = build(config)
    norms, losses = [], []
    for step in range(STEPS):
        batches = micro_batches(cut, step)
        batches = [joined(batches)] if whole else batches
        done = training_step(config, mesh, engine, batches, step=step, lr=config.optim.lr)
        norms.append(done.result.grad_norm)
        losses.append(done.metrics["load_balancing_loss" if whole else "global_balancing_loss"])
    return norms, losses, engine.optimizer_state.gather()["weights"]


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["router=noisy_topk", "model.recompute=block"],
        ["model.hidden_dropout=0.1", "router.scoring_func=sigmoid"],
        ["data=sft", "data.path=unread"],
    ],
    ids=["topk", "noisy, recomputed", "dropout, sigmoid", "rows and padding"],
)
def test_many_micro_batches_train_as_one(more: list[str]) -> None:
    cut = [*more, f"router.global_aux_loss_coef={COEFFICIENT}"]
    one = [*more, f"router.aux_loss_coef={COEFFICIENT}", "train.micro_batch_size=8"]
    (norms, losses, weights), (expected_norms, expected_losses, expected) = (
        run_ranks(1, _steps, overrides, whole)[0] for overrides, whole in ((cut, False), (one, True))
    )
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for name, weight in weights.items():
        assert (weight - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_the_loss_of_each_micro_batch_would_differ() -> None:
    """The bound above can fail: the ordinary loss over four micro-batches has another gradient."""
    norms = run_ranks(1, _steps, [f"router.aux_loss_coef={COEFFICIENT}", "router.global_aux_loss_coef=1e-9"], False)[0][
        0
    ]
    one = [f"router.aux_loss_coef={COEFFICIENT}", "train.micro_batch_size=8"]
    assert norms != pytest.approx(run_ranks(1, _steps, one, True)[0][0], rel=1e-3)

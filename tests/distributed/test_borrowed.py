"""DeepSpeed's insides, if they moved, are an error that says what would be lost: real engines, one thing changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups

from moe.engine.deepspeed import borrowed
from moe.errors import UserError
from tests.distributed.training import build, config_of, engine_steps
from tests.ranks import run_ranks

FLOAT32, BFLOAT16 = "float32", "bfloat16"
ZERO, BF16 = DeepSpeedZeroOptimizer, BF16_Optimizer


def _gone(owner: Any, name: str) -> None:
    delattr(owner, name)


def _other_parameters(owner: Any, name: str) -> None:
    original = getattr(owner, name)
    setattr(owner, name, lambda *arguments, another=None, **keywords: original(*arguments, **keywords))


def _moved(change: Callable[[Any, str], None], owner: Any, name: str, precision: str, expert: int) -> str:
    change(owner, name)
    config = config_of([f"train.precision={precision}", f"parallel.expert_parallel_size={expert}"])
    try:
        mesh, engine = build(config)
        engine_steps(config, mesh, engine, 0, 1)
        engine.optimizer_state.gather()
    except RuntimeError as error:
        return str(error)
    return "nothing was said"


BORROWED = [  # (owner, name, precision, expert-parallel size)
    (ZERO, "scaled_global_norm", FLOAT32, 1),
    (ZERO, "get_grad_norm_direct", FLOAT32, 1),
    (ZERO, "_get_preflattened_grad_partition", FLOAT32, 1),
    (ZERO, "unscale_and_clip_grads", FLOAT32, 1),
    (ZERO, "_link_all_hp_params", FLOAT32, 1),
    (ZERO, "update_lp_params", FLOAT32, 1),
    (ZERO, "_lazy_init_hp_params_optimizer_state", FLOAT32, 1),
    (BF16, "get_grads_for_norm", BFLOAT16, 1),
    (groups, "_create_expert_and_data_parallel", FLOAT32, 2),
    (groups, "_get_expert_parallel_group", FLOAT32, 2),
]


@pytest.mark.parametrize(("owner", "name", "precision", "expert"), BORROWED, ids=[one[1] for one in BORROWED])
def test_what_takes_other_arguments_is_named(owner: Any, name: str, precision: str, expert: int) -> None:
    for said in run_ranks(expert, _moved, _other_parameters, owner, name, precision, expert):
        assert f".{name} takes (" in said
        assert "without it" in said


# DeepSpeed calls the others itself: their absence is its own error.
OURS_ALONE = [one for one in BORROWED if one[1] in ("scaled_global_norm", "get_grads_for_norm", "update_lp_params")]


@pytest.mark.parametrize(("owner", "name", "precision", "expert"), OURS_ALONE, ids=[one[1] for one in OURS_ALONE])
def test_what_is_gone_is_named(owner: Any, name: str, precision: str, expert: int) -> None:
    (said,) = run_ranks(expert, _moved, _gone, owner, name, precision, expert)
    assert f".{name} is gone" in said


def _clips_elsewhere(owner: Any, name: str) -> None:
    """A version that computes the norm by another method: ours is never asked."""
    owner.scaled_global_norm_of_another_version = owner.scaled_global_norm
    source = owner.step

    def step(self: Any, closure: Any = None) -> Any:
        patched = self.__dict__.pop("scaled_global_norm")
        try:
            return source(self, closure)
        finally:
            self.scaled_global_norm = patched

    owner.step = step


def _does_not_clip(owner: Any, name: str) -> None:
    """A version that clips by another method: the one that ours stands in for is not called."""
    source = owner.step

    def step(self: Any, closure: Any = None) -> Any:
        patched, self.unscale_and_clip_grads = self.unscale_and_clip_grads, lambda *_: None
        try:
            return source(self, closure)
        finally:
            self.unscale_and_clip_grads = patched

    owner.step = step


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_clips_elsewhere, "ask for the gradient norm before an update"),
        (_does_not_clip, "clip, then update, each parameter group once an update"),
    ],
)
def test_what_no_longer_means_the_same_is_named_at_the_first_step(change: Any, said: str) -> None:
    (found,) = run_ranks(1, _moved, change, ZERO, "step", FLOAT32, 1)
    assert said in found


def test_another_version_is_one_line_for_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(borrowed, "version", lambda name: "0.20.1")
    with pytest.raises(UserError, match=r"deepspeed 0\.20\.1 is installed.*pip install deepspeed==0\.19\.8"):
        borrowed.check_version()


def test_the_version_is_the_pinned_one() -> None:
    from pathlib import Path

    pinned = Path(__file__).resolve().parents[2] / "pyproject.toml"
    assert f'"deepspeed=={borrowed.WRITTEN_FOR}"' in pinned.read_text(encoding="utf-8")


def _accumulated(engine: str, precision: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    config = config_of([f"engine={engine}", f"train.precision={precision}", "optim.max_grad_norm=1e9"])
    mesh, built = build(config)
    done = engine_steps(config, mesh, built, 0, 1)
    return done.norms, built.optimizer_state.gather()["exp_avg"]


def test_bfloat16_counts_every_micro_batch_once() -> None:
    """After one step of four micro-batches Adam's first moment is a tenth of the gradient."""
    ((norms, moments),) = run_ranks(1, _accumulated, "deepspeed", BFLOAT16)
    ((expected_norms, expected),) = run_ranks(1, _accumulated, "plain", BFLOAT16)
    assert norms == pytest.approx(expected_norms, rel=1e-3)
    for name, moment in moments.items():
        assert (moment - expected[name]).norm() <= 1e-2 * expected[name].norm(), name

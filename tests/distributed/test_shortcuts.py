"""What DeepSpeed need not do on a CPU (moe/engine/deepspeed/shortcuts.py, bfloat16_shortcuts.py) changes no result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe.config.compose import load_config
from moe.distributed import rendezvous
from moe.engine import build_engine, prepare
from moe.engine.adamw import AdamW
from moe.engine.base import SkipReason
from moe.engine.deepspeed import engine as engine_module
from moe.engine.deepspeed.shortcuts import LARGE, ROW, _adamw, _clipped, squared_norm
from moe.model.transformer import Transformer
from moe.sparse.balance import balance_loss
from tests.ranks import run_ranks

STEPS, MICRO_BATCHES, BATCH, LENGTH = 6, 4, 2, 16
OVERRIDES = [
    "model.vocab_size=320", "model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=2",
    f"train.sequence_length={LENGTH}", f"train.micro_batch_size={BATCH}",
    f"train.global_batch_size={BATCH * MICRO_BATCHES}",
    "router.num_experts=4", "model.initializer=normal", "model.initializer_range=0.2", "optim.lr=1e-2",
]  # fmt: skip


def _run(overrides: list[str], shortcuts: bool, bad_step: int | None) -> dict[str, Any]:
    engine_module.SMALL_GRADIENT = 5000  # so that this small model has gradients on both sides of it
    if not shortcuts:
        engine_module._takes_shortcuts = _never
    config = load_config([*OVERRIDES, *overrides])
    mesh = prepare(config, rendezvous.start(config.parallel.expert_parallel_size))
    torch.set_num_threads(1)
    model = Transformer(config.model, config.router, config.experts, expert_group=mesh.expert_group)
    model.init_weights(config.train.seed)
    engine = build_engine(model, config, mesh)
    losses, results = [], []
    for step in range(STEPS):
        result = None
        generator = torch.Generator().manual_seed(step)
        ids_MBS = torch.randint(320, (MICRO_BATCHES, BATCH, LENGTH), generator=generator)
        for ids_BS in ids_MBS[mesh.rank :: mesh.world_size]:
            output = engine(ids_BS, labels_BS=ids_BS.roll(-1, 1))
            loss = output.lm_loss_sum / ids_BS.numel() + balance_loss(output.routers)
            engine.backward(loss * float("inf") if step == bad_step else loss)
            losses.append(loss.item())
            result = engine.step(config.optim.lr)
        results.append(result)
    state = engine.optimizer_state.gather()
    shared = all(
        torch.equal(parameter, state["weights"][name].view_as(parameter))
        for name, parameter in model.named_parameters()
    )
    rendezvous.stop()
    return {"losses": losses, "results": results, "state": state, "weights are the masters": shared}


def _never(*_: Any) -> bool:
    return False


def _pair(world_size: int, overrides: list[str], bad_step: int | None = None) -> list[tuple[dict, dict]]:
    with_them, without = (run_ranks(world_size, _run, overrides, shortcuts, bad_step) for shortcuts in (True, False))
    return list(zip(with_them, without, strict=True))


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, ["parallel.zero_stage=1"]),
        (2, ["parallel.zero_stage=1"]),
        (2, ["parallel.zero_stage=2"]),
        (2, ["parallel.expert_parallel_size=2"]),
    ],
    ids=["one rank", "two ranks", "ZeRO-2", "experts split"],
)
@pytest.mark.parametrize("limit", [1e9, 0.5], ids=["unclipped", "clipped"])
def test_shortcuts_change_nothing(world_size: int, overrides: list[str], limit: float) -> None:
    for ours, theirs in _pair(world_size, [*overrides, f"optim.max_grad_norm={limit}"]):
        norms = [[result.grad_norm for result in run["results"]] for run in (ours, theirs)]
        assert norms[0] == pytest.approx(norms[1], rel=2e-7)
        assert (min(norms[1]) > limit) == (limit < 1)
        assert ours["weights are the masters"]
        if limit > 1:  # no rounding of the norm enters: every bit agrees
            assert ours["losses"] == theirs["losses"]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-6)
        for kind, tensors in theirs["state"].items():
            for name, tensor in tensors.items():
                if limit > 1:
                    assert torch.equal(ours["state"][kind][name], tensor), f"{kind} {name}"
                error = (ours["state"][kind][name] - tensor).norm() / tensor.norm()
                assert error <= 1e-5, f"{kind} {name} differs by {error:.1e}"


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [(1, []), (2, []), (2, ["parallel.expert_parallel_size=2"])],
    ids=["one rank", "two ranks", "experts split"],
)
@pytest.mark.parametrize("limit", [1e9, 0.5], ids=["unclipped", "clipped"])
def test_bfloat16_shortcuts_change_no_bit(world_size: int, overrides: list[str], limit: float) -> None:
    more = ["train.precision=bfloat16", f"optim.max_grad_norm={limit}", *overrides]
    for ours, theirs in _pair(world_size, more, bad_step=3):
        assert [result.skipped for result in ours["results"]] == [result.skipped for result in theirs["results"]]
        assert ours["results"][3].skipped is SkipReason.not_finite
        applied = [(a.grad_norm, b.grad_norm) for a, b in zip(ours["results"], theirs["results"], strict=True)]
        assert all(a == b for index, (a, b) in enumerate(applied) if index != 3)
        assert ours["losses"] == theirs["losses"]
        for kind, tensors in theirs["state"].items():
            for name, tensor in tensors.items():
                assert torch.equal(ours["state"][kind][name], tensor), f"{kind} {name}"


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_gradient_that_is_not_finite_is_refused_as_before(world_size: int) -> None:
    for ours, theirs in _pair(world_size, [], bad_step=2):
        expected = [SkipReason.not_finite if step == 2 else None for step in range(STEPS)]
        assert [result.skipped for result in ours["results"]] == expected
        assert [result.skipped for result in theirs["results"]] == expected
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-6)


@pytest.mark.parametrize("numel", [1, LARGE - 1, LARGE, LARGE + ROW + 7])
def test_norm_in_rows_equals_float64(numel: int) -> None:
    gradient = torch.randn(numel, generator=torch.Generator().manual_seed(numel)) * 1e-3
    assert squared_norm(gradient).item() == pytest.approx(gradient.double().square().sum().item(), rel=3e-8)


class _Zero:
    """What clipping and updating read of a ZeRO optimizer: a partition of two gradients, norm 2, limit 1."""

    clip_grad = 1.0

    def __init__(self) -> None:
        self.partition = torch.zeros(6, requires_grad=True)
        self.optimizer = AdamW([{"params": [self.partition], "muon": False}], lr=0.1, fused=True)
        self.averaged_gradients = {0: [torch.ones(2, 2), torch.full((2,), 3.0)]}
        self._global_grad_norm = torch.tensor(2.0)


def test_gradients_are_scaled_and_used_where_they_are() -> None:
    zero, reference = _Zero(), torch.zeros(6, requires_grad=True)
    _adamw(zero.optimizer, 0, _clipped(zero, 0))  # makes the moments
    zero.averaged_gradients = _Zero().averaged_gradients
    with _Allocations() as made:
        _adamw(zero.optimizer, 0, _clipped(zero, 0))
    assert max(made.sizes) == 1, "only AdamW's counters"
    optimizer = torch.optim.AdamW([reference], lr=0.1, fused=True)
    for _ in range(2):
        reference.grad = torch.tensor([0.5] * 4 + [1.5] * 2)
        optimizer.step()
    torch.testing.assert_close(zero.partition, reference, rtol=1e-6, atol=0)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        torch.testing.assert_close(zero.optimizer.state[zero.partition][name], optimizer.state[reference][name])


class _Allocations(TorchDispatchMode):
    """Notes the size of every tensor that an operator makes, and doesn't only look at."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in args if isinstance(one, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.sizes.append(result.numel())
        return result

"""Muon in both engines beside a loop written by hand; tests/distributed/test_engine.py compares the engines at all
topologies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.config import EngineKind
from moe.config.optim import matrix_shape
from moe.engine.base import MOMENTUM, SkipReason, States, StepResult
from moe.engine.parameters import muon_shapes
from moe.errors import UserError
from moe.model.build import build_model
from moe.plan.trained import parameter_shapes
from moe.train.objective import training_step
from tests.distributed.training import (
    Training,
    around_two_steps,
    backward_by_hand,
    build,
    config_of,
    engine_steps,
    gathered,
    micro_batches,
)
from tests.ranks import run_ranks
from tests.unit.engine.test_muon import by_singular_values

MUON = ["optim=muon", "model.num_hidden_layers=3", "model.intermediate_size=44"]  # as in test_engine
STEPS = 5
each_engine = pytest.mark.parametrize("kind", [kind.name for kind in EngineKind])


def _by_hand() -> dict[str, Tensor]:
    """Weights after some steps, without any of the engines' code: expert by expert, in float64 by singular values."""
    config = config_of(MUON)
    model = build_model(config, torch.device("cpu"))
    named = dict(model.named_parameters())
    rest = {name: p for name, p in named.items() if "_proj" not in name}  # the embedding, the head, norms and routers
    assert set(rest) == {
        name for name in named if name.endswith(("norm.weight", "gate.weight", "tokens.weight", "head.weight"))
    }
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in rest.values() if p.ndim > 1]},
            {"params": [p for p in rest.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True,
    )  # fmt: skip
    momentum = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in named.items() if name not in rest}
    for step in range(STEPS):
        backward_by_hand(model, config, step)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        for name, moment in momentum.items():
            _update(named[name], moment, name)
        model.zero_grad()
    return {name: parameter.detach() for name, parameter in named.items()}


@torch.no_grad()
def _update(weight: nn.Parameter, moment: Tensor, name: str) -> None:
    assert weight.grad is not None
    moment.mul_(0.95).add_(weight.grad.double(), alpha=0.05)
    nesterov = 0.95 * moment + 0.05 * weight.grad.double()
    matrices = nesterov.unbind() if weight.ndim == 3 else (nesterov,)
    updates = []
    for one in matrices:
        alone = one.chunk(2) if name.endswith("gate_up_proj") else (one,)
        updates.append(torch.cat([0.2 * math.sqrt(max(m.shape)) * by_singular_values(m) for m in alone]))
    update = torch.stack(updates) if weight.ndim == 3 else updates[0]
    weight.copy_(weight * (1 - 1e-3 * 0.1) - 1e-3 * update)


def _steps(overrides: list[str], count: int = STEPS) -> Training:
    config = config_of([*MUON, *overrides])
    mesh, engine = build(config)
    done = engine_steps(config, mesh, engine, 0, count)
    done.state = engine.optimizer_state.gather()
    return done


@each_engine
def test_an_engine_equals_a_loop_by_hand(kind: str) -> None:
    (found,), (expected,) = run_ranks(1, _steps, [f"engine={kind}"]), run_ranks(1, _by_hand)
    assert found.state["weights"].keys() == expected.keys()
    for name, weight in expected.items():
        assert (found.state["weights"][name] - weight).norm() <= 3e-6 * weight.norm(), name


def _cuts(overrides: list[str]) -> tuple[int, int]:
    _, engine = build(config_of([*MUON, *overrides]))
    pieces = [piece for one in vars(engine)["_zero"].optimizer.matrices.values() for piece in one.pieces]
    return sum(not piece.is_whole for piece in pieces), len(pieces)


@pytest.mark.parametrize(("ranks", "expert"), [(2, 1), (4, 2)])
def test_partitions_do_end_inside_matrices(ranks: int, expert: int) -> None:
    """Otherwise comparing topologies would show little."""
    cut, all_pieces = zip(*run_ranks(ranks, _cuts, [f"parallel.expert_parallel_size={expert}"]), strict=True)
    assert sum(cut) >= 2
    assert sum(all_pieces) > sum(cut)


BFLOAT16 = "train.precision=bfloat16"


@pytest.mark.parametrize(
    ("ranks", "expert", "stage"), [(1, 1, 1), (2, 1, 1), (2, 2, 1), (4, 2, 1), (1, 1, 2), (2, 2, 2)]
)
def test_bfloat16_follows_the_plain_engine(ranks: int, expert: int, stage: int) -> None:
    stages = [f"parallel.expert_parallel_size={expert}", f"parallel.zero_stage={stage}"]
    results = run_ranks(ranks, _steps, [BFLOAT16, *stages])
    (expected,) = run_ranks(1, _steps, [BFLOAT16, "engine=plain"])
    for result in results:  # activations have 8 bits: AdamW's losses differ by 3e-3 there too
        assert result.losses == pytest.approx(expected.losses, rel=5e-3)
        assert result.norms == pytest.approx(expected.norms, rel=5e-2)
    for name, weight in gathered(results, expert)["weights"].items():
        assert (weight - expected.state["weights"][name]).norm() <= 1e-2 * weight.norm(), name
    assert results[0].state.keys() == {"weights", "exp_avg", "exp_avg_sq", MOMENTUM}
    assert all(tensor.dtype == torch.float32 for kind in results[0].state.values() for tensor in kind.values())


def _skip(overrides: list[str]) -> tuple[States, StepResult, States, States, States]:
    """State before and after a skipped step, then after one more; and the latter in a run without the skipped one."""
    config = config_of([*MUON, *overrides])

    def step(mesh: Any, engine: Any, number: int, **limits: float) -> StepResult:
        batches = micro_batches(config, number)[mesh.rank :: mesh.world_size]
        return training_step(config, mesh, engine, batches, step=number, lr=config.optim.lr, **limits).result

    mesh, engine = build(config)
    step(mesh, engine, 0)
    before = engine.optimizer_state.gather()
    skipped = step(mesh, engine, 1, norm_limit=1e-9)
    after = engine.optimizer_state.gather()
    step(mesh, engine, 2)
    then = engine.optimizer_state.gather()
    mesh, engine = build(config)
    step(mesh, engine, 0)
    step(mesh, engine, 2)
    return before, skipped, after, then, engine.optimizer_state.gather()


SKIPPING = [
    ("engine=plain", 1, 1, "float32"),
    ("parallel.zero_stage=1", 2, 2, "float32"),
    ("parallel.zero_stage=2", 2, 1, "float32"),
    ("parallel.zero_stage=1", 2, 2, "bfloat16"),
]


@pytest.mark.parametrize(("override", "ranks", "expert", "precision"), SKIPPING)
def test_a_skipped_step_moves_nothing(override: str, ranks: int, expert: int, precision: str) -> None:
    overrides = [override, f"train.precision={precision}", f"parallel.expert_parallel_size={expert}"]
    for before, result, after, then, never in run_ranks(ranks, _skip, overrides):
        assert result.skipped is SkipReason.spike
        assert before.keys() == after.keys()
        for kind, tensors in before.items():
            for name, tensor in tensors.items():
                assert torch.equal(after[kind][name], tensor), (kind, name)
                assert torch.equal(then[kind][name], never[kind][name]), (kind, name)
        assert all(tensor.any() for tensor in before[MOMENTUM].values())


@each_engine
def test_an_expert_that_never_had_tokens_only_decays(kind: str) -> None:
    before, after = run_ranks(1, around_two_steps, [*MUON, f"engine={kind}"], [1])[0]
    optim = config_of(MUON).optim
    kept = (1 - optim.lr * optim.weight_decay) ** 2
    experts = [name for name in after[MOMENTUM] if ".experts." in name]
    assert experts
    for name in experts:
        assert not after[MOMENTUM][name][1].any()
        assert after[MOMENTUM][name].any(), "no expert had a gradient"
        torch.testing.assert_close(after["weights"][name][1], before["weights"][name][1] * kept, rtol=1e-6, atol=0)


def _refused(overrides: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        build(config_of([*MUON, *overrides]))
    return str(caught.value)


def test_nothing_for_muon_to_train_is_refused() -> None:
    assert run_ranks(1, _refused, ["optim.freeze=['*_proj*']"])[0].startswith(
        "optim=muon: nothing that trains is a matrix of attention, an MLP or experts (trained are model.embed_tokens"
    )


LORA = ["adapter=lora", "init_from=unread", "adapter.r=4", "adapter.target_modules=[q_proj,experts]"]


def _lora() -> States:
    return _steps([*LORA, "adapter.modules_to_save=[o_proj]"], 2).state


def test_adapters_are_adamws_and_what_trains_in_full_is_muons() -> None:
    (state,) = run_ranks(1, _lora)
    assert set(state[MOMENTUM]) == {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(3)}
    assert set(state["exp_avg"]) == set(state["weights"]) - set(state[MOMENTUM])
    assert any(name.endswith("lora.A") for name in state["exp_avg"])


@pytest.mark.parametrize(
    "overrides",
    [[], ["model.mlp=dense"], ["model.n_shared_experts=1", "model.sparse_layers=every_2", "model.qk_norm=head"]],
)
def test_the_plan_knows_which_matrices_they_are(overrides: list[str]) -> None:
    config = config_of([*MUON, *overrides])
    planned = {name: matrix_shape(name, shape) for name, shape in parameter_shapes(config).items()}
    model = build_model(config, torch.device("cpu"))
    assert muon_shapes(model, config) == {name: shape for name, shape in planned.items() if shape is not None}

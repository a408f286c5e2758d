"""Routers with state, one made outside the package (tests/bias_router): exact on any topology, across resumes.

Its bias follows counts over all ranks and micro-batches, which are whole numbers, so it is bitwise the same everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tests.bias_router.router
from moe.checkpoint.reader import load, load_model, newest
from moe.checkpoint.state import TrainState
from moe.checkpoint.writer import Saver
from moe.config import CheckpointConfig
from moe.config.compose import read_config, to_yaml
from moe.engine.base import Engine
from moe.sparse import routers_of
from moe.train.objective import training_step
from tests.distributed.training import build, config_of, engine_steps, gathered, micro_batches
from tests.ranks import run_ranks

BIAS = tests.bias_router.router
ROUTER = ["router=bias", "router.rate=0.02", "router.num_experts=4"]
LOSSFREE = ["router=lossfree", "router.num_experts=4", "model.n_shared_experts=1"]
TOPOLOGIES = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]  # (ranks, expert-parallel size)
STEPS = 10


@dataclass
class Run:
    losses: list[float]
    norms: list[float]
    state: dict[str, dict[str, Tensor]]
    experts: set[str]
    buffers: dict[str, Tensor]


def _buffers(engine: Engine) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in engine.model.named_buffers() if "gate." in name}


def _overrides(expert: int, *more: str, router: list[str] = ROUTER) -> list[str]:
    return [*router, f"parallel.expert_parallel_size={expert}", *more]


def _train(expert: int, precision: str, engine_kind: str) -> Run:
    config = config_of(_overrides(expert, f"train.precision={precision}", f"engine={engine_kind}"))
    mesh, engine = build(config)
    done = engine_steps(config, mesh, engine, 0, STEPS)
    return Run(done.losses, done.norms, engine.optimizer_state.gather(), engine.expert_names, _buffers(engine))


@cache
def _trained(ranks: int, expert: int, precision: str, engine: str = "deepspeed") -> list[Run]:
    return run_ranks(ranks, _train, expert, precision, engine)


@pytest.mark.parametrize(("ranks", "expert"), TOPOLOGIES)
def test_exact_on_every_topology(ranks: int, expert: int) -> None:
    (one,), runs = _trained(1, 1, "float32", "plain"), _trained(ranks, expert, "float32")
    for run in runs:
        assert run.losses == pytest.approx(one.losses, rel=1e-6)
        assert run.norms == pytest.approx(one.norms, rel=2e-6)
        assert run.buffers.keys() == one.buffers.keys()
        for name, buffer in run.buffers.items():
            assert torch.equal(buffer, one.buffers[name]), name
    for kind, tensors in gathered(runs, expert).items():  # type: ignore[arg-type]
        for name, tensor in tensors.items():
            expected = one.state[kind][name]
            assert (tensor - expected).norm() <= 2e-5 * expected.norm().clamp(min=1e-20), name


def test_the_bias_moves_and_balances() -> None:
    (one,) = _trained(1, 1, "float32")
    moved = [buffer for name, buffer in one.buffers.items() if name.endswith("moved")]
    biases = [buffer for name, buffer in one.buffers.items() if name.endswith("bias")]
    assert [int(count) for count in moved] == [STEPS] * 2
    assert all(bias.abs().max() > 0.01 for bias in biases)


def test_buffers_stay_float32_under_bfloat16_weights() -> None:
    (one,) = _trained(1, 1, "bfloat16")
    biases = [buffer for name, buffer in one.buffers.items() if name.endswith("bias")]
    assert all(bias.dtype == torch.float32 for bias in biases)
    assert any(not torch.equal(bias, bias.bfloat16().float()) for bias in biases), "rounded to bfloat16"


def _save(folder: Path, expert: int, router: list[str]) -> tuple[list[float], dict[str, Tensor]]:
    config = config_of(_overrides(expert, router=router))
    mesh, engine = build(config)
    engine_steps(config, mesh, engine, 0, 3)
    saver = Saver(folder, mesh, CheckpointConfig(), print, print)
    saver.save(engine, TrainState(step=3, consumed=24, tokens=384, tokenizer="t", data="d"), to_yaml(config))
    assert saver.wait()
    saved = _buffers(engine)
    return engine_steps(config, mesh, engine, 3, 3).losses, saved


def _resume(folder: Path, expert: int, router: list[str]) -> tuple[list[float], dict[str, Tensor]]:
    config = config_of(_overrides(expert, router=router))
    mesh, engine = build(config)
    checkpoint = newest(folder, mesh, print)
    assert checkpoint is not None
    load(checkpoint, engine, mesh)
    read = _buffers(engine)
    return engine_steps(config, mesh, engine, 3, 3).losses, read


SAME, RESHARDED = [((1, 1), (1, 1)), ((2, 2), (2, 2))], [((2, 2), (1, 1)), ((1, 1), (2, 2)), ((4, 2), (2, 1))]


@pytest.mark.parametrize(
    ("saved", "resumed", "router"),
    [(*case, ROUTER) for case in SAME + RESHARDED] + [(*case, LOSSFREE) for case in (SAME[1], RESHARDED[2])],
)
def test_resumes_and_reshards_bitwise(
    saved: tuple[int, int], resumed: tuple[int, int], router: list[str], tmp_path: Path
) -> None:
    losses, buffers = run_ranks(saved[0], _save, tmp_path, saved[1], router)[0]
    assert buffers
    assert all(buffer.count_nonzero() > 0 for buffer in buffers.values())
    for again, read in run_ranks(resumed[0], _resume, tmp_path, resumed[1], router):
        assert read.keys() == buffers.keys()
        assert all(torch.equal(read[name], buffers[name]) for name in buffers)
        assert again == (losses if saved == resumed else pytest.approx(losses, rel=1e-6))
    folder = tmp_path / "checkpoints" / "step_00000003"
    config = read_config(folder / "config.yaml")
    assert type(config.router) is type(config_of(router).router)
    whole = dict(load_model(folder).named_buffers())
    assert all(torch.equal(whole[name], buffers[name]) for name in buffers)


def _skip_a_step() -> list[int]:
    config = config_of(_overrides(1))
    mesh, engine = build(config)
    moved = []
    for step in range(3):
        batches = micro_batches(config, step)
        if step == 1:
            original = engine.backward
            engine.backward = lambda loss, original=original: original(loss * math.nan)  # type: ignore[method-assign]
        training_step(config, mesh, engine, batches, step=step, lr=1e-3)
        if step == 1:
            engine.backward = original  # type: ignore[method-assign]
        moved.append(int(_buffers(engine)["model.layers.0.mlp.gate.moved"]))
    return moved


def test_a_skipped_step_leaves_the_router_alone() -> None:
    assert run_ranks(1, _skip_a_step) == [[1, 1, 2]]


def test_its_losses_and_diagnostics_are_metrics() -> None:
    def metrics() -> dict[str, object]:
        config = config_of(_overrides(1))
        mesh, engine = build(config)
        return training_step(config, mesh, engine, micro_batches(config, 0), step=0, lr=1e-3).metrics

    (found,) = run_ranks(1, metrics)
    assert {
        "score_penalty",
        "score_penalty_layers",
        "load_balancing_loss",
        "largest_bias",
        "max_violation",
    } <= found.keys()
    assert "router_z_loss" not in found


def _steps_known(folder: Path) -> list[tuple[int, int]]:
    """What the first router knows in a forward pass of step 2, after that step, and in the model of its checkpoint."""
    config = config_of([*_overrides(1), "train.steps=20", "model.recompute=block"])
    mesh, engine = build(config)
    router = next(iter(routers_of(engine.model)))
    seen: set[tuple[int, int]] = set()
    router.register_forward_hook(lambda *_: seen.add((router.step, router.total_steps)))
    engine_steps(config, mesh, engine, 0, 2)
    seen.clear()
    engine_steps(config, mesh, engine, 2, 1)
    (in_the_step,) = seen  # forward passes and their recomputations
    saver = Saver(folder, mesh, CheckpointConfig(), print, print)
    saver.save(engine, TrainState(step=3), to_yaml(config))
    assert saver.wait()
    loaded = next(iter(routers_of(load_model(folder / "checkpoints" / "step_00000003"))))
    return [in_the_step, (router.step, router.total_steps), (loaded.step, loaded.total_steps)]


def test_a_schedule_sees_one_step_in_recomputation_evaluation_and_generation(tmp_path: Path) -> None:
    assert run_ranks(1, _steps_known, tmp_path) == [[(2, 20)] * 3]

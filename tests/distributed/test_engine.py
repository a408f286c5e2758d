"""The seam with DeepSpeed: the same global batch gives the same training at any topology, and as plain PyTorch does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe.compose import load_config
from moe.config import Config, Precision
from moe.dist import topology as topology_module
from moe.dist.engine import Engine, expert_groups
from moe.model.transformer import Transformer
from moe.sparse.balance import balance_loss
from tests.ranks import run_ranks

STEPS = 6
OVERRIDES = [
    "model.vocab_size=320", "model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=2",
    "train.sequence_length=16", "train.micro_batch_size=2", "train.global_batch_size=8", "optim.lr=1e-2",
    "optim.max_grad_norm=0.5", "router.num_experts=4", "model.initializer_range=0.2",
]  # fmt: skip


def _config(*more: str) -> Config:
    return load_config([*OVERRIDES, *more])


def _micro_batches(config: Config, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """All of a step's micro-batches in global order; some targets are masked, the last micro-batch's entirely."""
    generator = torch.Generator().manual_seed(step)
    train = config.train
    batches = []
    for index in range(train.global_batch_size // train.micro_batch_size):
        shape = (train.micro_batch_size, train.sequence_length)
        ids = torch.randint(0, config.model.vocab_size, shape, generator=generator)
        labels = torch.where(torch.rand(shape, generator=generator) < 0.2, -100, ids.roll(-1, 1))
        if index == train.global_batch_size // train.micro_batch_size - 1:
            labels = torch.full_like(labels, -100)
        batches.append((ids, labels))
    return batches


def _loss(config: Config, output: Any, targets: int, micro_batches: int) -> torch.Tensor:
    balance = balance_loss(output.routers, config.router)
    return output.lm_loss_sum * (micro_batches / targets) + balance.total


def _engine_run(overrides: list[str]) -> dict[str, Any]:
    config = _config(*overrides)
    topology = topology_module.start(config.parallel.expert)
    torch.set_num_threads(1)
    model = Transformer(config.model, config.router, config.experts, expert_group=expert_groups(topology)[0])
    model.init_weights(config.train.seed)
    engine = Engine(model, config, topology)
    losses, norms = [], []
    for step in range(STEPS):
        batches = _micro_batches(config, step)
        targets = sum(int((labels != -100).sum()) for _, labels in batches)
        total = torch.zeros((), dtype=torch.float64)
        for ids, labels in batches[topology.rank :: topology.world_size]:
            loss = _loss(config, engine(ids, labels_BS=labels), targets, len(batches))
            engine.backward(loss)
            total += loss.detach().double()
            result = engine.step(config.optim.lr)
        losses.append(topology.sum_(total).item() / len(batches))
        assert result is not None
        assert result.applied
        norms.append(result.grad_norm)
    state = engine.master_state()
    experts = engine.expert_names
    topology_module.stop()
    return {"losses": losses, "norms": norms, "state": state, "experts": experts}


def _plain_run(overrides: list[str]) -> dict[str, Any]:
    """The same without DeepSpeed: PyTorch's AdamW and clipping, one process."""
    config = _config(*overrides)
    model = Transformer(config.model, config.router, config.experts)
    model.init_weights(config.train.seed)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": config.optim.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=tuple(config.optim.betas), eps=config.optim.eps)
    losses, norms = [], []
    for step in range(STEPS):
        batches = _micro_batches(config, step)
        targets = sum(int((labels != -100).sum()) for _, labels in batches)
        optimizer.zero_grad()
        total = 0.0
        for ids, labels in batches:
            loss = _loss(config, model(ids, labels_BS=labels), targets, len(batches)) / len(batches)
            loss.backward()
            total += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)))
        optimizer.step()
        losses.append(total)
    names = dict(model.named_parameters())
    state = {"weights": {name: p.detach() for name, p in names.items()}}
    for moment in ("exp_avg", "exp_avg_sq"):
        state[moment] = {name: optimizer.state[p][moment] for name, p in names.items()}
    return {"losses": losses, "norms": norms, "state": state}


def _gathered(results: list[dict[str, Any]], expert: int) -> dict[str, dict[str, torch.Tensor]]:
    """Whole tensors from the first `expert` ranks' slices."""
    whole: dict[str, dict[str, torch.Tensor]] = {}
    for kind, tensors in results[0]["state"].items():
        whole[kind] = {
            name: torch.cat([result["state"][kind][name] for result in results[:expert]])
            if name in results[0]["experts"] and expert > 1
            else tensor
            for name, tensor in tensors.items()
        }
    return whole


def _assert_same(run: list[dict[str, Any]], expert: int, reference: dict[str, Any], tolerance: float) -> None:
    for result in run:
        assert result["losses"] == pytest.approx(reference["losses"], rel=tolerance)
        assert result["norms"] == pytest.approx(reference["norms"], rel=tolerance)
    for kind, tensors in _gathered(run, expert).items():
        expected = reference["state"][kind]
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert tensor.any(), f"{kind} {name} is all zeros: nothing was compared"
            error = (tensor - expected[name]).norm() / expected[name].norm()
            assert error <= 10 * tolerance, f"{kind} of {name} differs by {error:.1e}"


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    torch.set_num_threads(1)
    return _plain_run([])


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_engine_equals_plain_pytorch(world_size: int, zero_stage: int, reference: dict[str, Any]) -> None:
    """2 ranks × 2 micro-batches and 1 rank × 4 micro-batches, with clipping, in losses, norm, moments and weights."""
    run = run_ranks(world_size, _engine_run, [f"parallel.zero_stage={zero_stage}"])
    _assert_same(run, 1, reference, 1e-6)


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_expert_parallel_equals_plain_pytorch(zero_stage: int, reference: dict[str, Any]) -> None:
    run = run_ranks(2, _engine_run, ["parallel.expert=2", f"parallel.zero_stage={zero_stage}"])
    _assert_same(run, 2, reference, 1e-6)


def test_clipping_was_active_in_the_reference(reference: dict[str, Any]) -> None:
    assert min(reference["norms"]) > _config().optim.max_grad_norm


@pytest.mark.parametrize("expert", [1, 2])
def test_bfloat16_keeps_float32_masters_and_follows_float32(expert: int, reference: dict[str, Any]) -> None:
    run = run_ranks(2, _engine_run, [f"parallel.expert={expert}", "train.precision=bfloat16"])
    assert Precision.bfloat16.name in str(_config("train.precision=bfloat16").train.precision)
    assert run[0]["losses"] == pytest.approx(reference["losses"], rel=2e-2)
    weights = _gathered(run, expert)["weights"]
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    gate = weights["model.layers.0.mlp.gate.weight"]
    assert not torch.equal(gate, gate.bfloat16().float()), "master weights carry only bfloat16's digits"

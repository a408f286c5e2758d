"""Fine-tuning's results don't depend on what fills up a sequence: one row a sequence, at two sequence lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moe.data.loader import Batch, _collate
from moe.data.packing import NO_TARGET, Sample, empty_sample
from moe.train.objective import training_step
from tests.distributed.training import build, config_of
from tests.ranks import run_ranks

STEPS, ROWS = 4, 8
CASES = {
    "topk": ["router.z_loss_coef=0.01"],
    "all balance losses, capacity": [
        "router=lossfree", "router.aux_loss_coef=0.1", "router.sequence_aux_loss_coef=0.1",
        "router.global_aux_loss_coef=0.1", "router.variance_loss_coef=0.5", "router.capacity_factor=1.0",
    ],
    "expert choice, recompute block": ["router=expert_choice", "model.recompute=block", "router.z_loss_coef=0.01"],
    "NEFTune, dropout in the router": ["router=noisy_topk", "train.neftune_noise_alpha=5", "model.recompute=mlp"],
    "a router from outside": ["router=bias", "router.rate=0.02"],
}  # fmt: skip
COMPARED = (
    "loss", "lm_loss", "max_violation", "max_violation_layers", "load_variation", "load_concentration",
    "dropped_fraction", "router_entropy", "router_confidence", "router_logit_size", "router_logit_max",
    "first_choice_weight", "router_entropy_of_mean", "router_gradient_norm", "expert_shares",
)  # fmt: skip


def _row(length: int, generator: np.random.Generator) -> Sample:
    size = int(generator.integers(20, 65))
    ids = generator.integers(1, 320, size)
    fill = length - size
    labels = np.where(np.arange(size - 1) >= size // 2, ids[1:], NO_TARGET)
    return Sample(
        np.concatenate([ids, np.zeros(fill, np.int64)]),
        np.concatenate([labels, np.full(fill + 1, NO_TARGET)]),
        np.repeat(np.array([0, 1], np.int32), [size, fill]),
        size,
    )


def _batches(length: int, step: int) -> list[Batch]:
    """Micro-batches of two sequences; the last two sequences fill up the batch."""
    generator = np.random.default_rng(step)
    rows = [_row(length, generator) for _ in range(ROWS - 2)] + [empty_sample(length, 0)] * 2
    first = step * ROWS
    return [_collate(rows[at : at + 2], [first + at, first + at + 1], [0, 0]) for at in range(0, ROWS, 2)]


def _trained(overrides: list[str], length: int) -> tuple[list[dict[str, Any]], list[float], dict[str, torch.Tensor]]:
    config = config_of(["data=sft", "data.path=unread", f"train.sequence_length={length}", "optim.lr=1e-3", *overrides])
    mesh, engine = build(config)
    metrics, norms = [], []
    for step in range(STEPS):
        batches = _batches(length, step)[mesh.rank :: mesh.world_size]
        done = training_step(config, mesh, engine, batches, step=step, lr=config.optim.lr)
        names = {*COMPARED, *(name for name in done.metrics if name.endswith(("_loss", "_variance", "_fraction")))}
        metrics.append({name: done.metrics[name] for name in sorted(names) if done.metrics.get(name) is not None})
        norms.append(done.result.grad_norm)
    return metrics, norms, {name: tensor.clone() for name, tensor in engine.model.named_parameters()}


def _all(length: int) -> dict[str, Any]:
    return {name: _trained([*overrides, "engine=plain"], length) for name, overrides in CASES.items()}


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return [run_ranks(1, _all, length, timeout=240)[0] for length in (64, 128)]


@pytest.mark.parametrize("name", CASES)
def test_the_sequence_length_of_unpacked_rows_changes_nothing(results: list[dict[str, Any]], name: str) -> None:
    (metrics, norms, weights), (expected, expected_norms, expected_weights) = (one[name] for one in results)
    for one, other in zip(metrics, expected, strict=True):
        assert one.keys() == other.keys() >= {"loss", "lm_loss", "max_violation", "expert_shares"}
        for key, value in one.items():
            assert np.array(value) == pytest.approx(np.array(other[key]), rel=2e-5, abs=1e-7), key
    assert norms == pytest.approx(expected_norms, rel=2e-5)
    for key, weight in weights.items():
        assert (weight - expected_weights[key]).norm() <= 1e-5 * expected_weights[key].norm(), key


def _on_ranks(expert: int) -> dict[str, Any]:
    more = [f"parallel.expert_parallel_size={expert}", "parallel.zero_stage=2"]
    return {name: _trained([*overrides, *more], 64) for name, overrides in CASES.items()}


@pytest.mark.parametrize(("ranks", "expert"), [(1, 1), (2, 1), (2, 2)])
def test_ranks_and_experts_on_ranks_change_nothing(results: list[dict[str, Any]], ranks: int, expert: int) -> None:
    """With two ranks one of them has a micro-batch of padding alone."""
    for found in run_ranks(ranks, _on_ranks, expert, timeout=240):
        for name, (metrics, norms, _) in found.items():
            expected, expected_norms, _ = results[0][name]
            for one, other in zip(metrics, expected, strict=True):
                for key, value in one.items():
                    assert np.array(value) == pytest.approx(np.array(other[key]), rel=2e-5, abs=1e-6), (name, key)
            assert norms == pytest.approx(expected_norms, rel=2e-5), name

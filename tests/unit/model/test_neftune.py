"""NEFTune: bounds by a row's own length, in training only, the same losses at any split into micro-batches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from moe.config.compose import load_config
from moe.model.build import build_model
from moe.model.neftune import noisy
from moe.sparse import Randomness
from moe.train.objective import training_step
from tests.distributed.training import build, config_of, joined, micro_batches
from tests.ranks import run_ranks

ALPHA, HIDDEN = 5.0, 64


def randomness(step: int = 0, samples: int = 2) -> Randomness:
    return Randomness.of(0, step, torch.arange(samples))


def test_noise_is_uniform_within_the_bound_of_each_rows_length() -> None:
    documents_BS = torch.tensor([[0] * 10 + [1] * 50 + [4] * 4, [2] * 64], dtype=torch.int32)
    x_BSH = torch.zeros(2, 64, HIDDEN)
    noise_BSH = noisy(x_BSH, documents_BS, ALPHA, randomness())
    for sequence, document, length in ((0, 0, 10), (0, 1, 50), (0, 4, 4), (1, 2, 64)):
        own = noise_BSH[sequence][documents_BS[sequence] == document] * math.sqrt(length * HIDDEN) / ALPHA
        assert 0.95 < own.abs().max() <= 1
        assert own.std() == pytest.approx(1 / math.sqrt(3), rel=0.1)
        assert own.mean() == pytest.approx(0, abs=0.1)
    whole_BSH = noisy(x_BSH, None, ALPHA, randomness())
    assert torch.allclose(noise_BSH[1], whole_BSH[1], atol=1e-7)  # one document: the whole sequence
    assert not torch.equal(whole_BSH, noisy(x_BSH, None, ALPHA, randomness(step=1)))


def test_the_model_has_noise_in_training_only() -> None:
    config = load_config(["model.hidden_size=32", "model.num_hidden_layers=1", "tokenizer.vocab_size=300"])
    model, ids_BS = build_model(config, torch.device("cpu")), torch.arange(24).view(2, 12)

    def loss(alpha: float | None) -> torch.Tensor:
        found = model(ids_BS, labels_BS=ids_BS, randomness=randomness(), neftune_noise_alpha=alpha).lm_loss_sum
        assert found is not None
        return found

    assert not torch.equal(loss(ALPHA), loss(None))
    assert torch.equal(loss(ALPHA), loss(ALPHA))
    with pytest.raises(ValueError, match="needs the batch's randomness"):
        model(ids_BS, neftune_noise_alpha=ALPHA)
    model.eval()
    assert torch.equal(loss(ALPHA), loss(None))


def _losses(together: int, alpha: str = "5") -> list[float]:
    """With micro-batches of 2 · `together` sequences. A dense model's: a balance loss is per micro-batch."""
    config = config_of(["engine=plain", "model.mlp=dense", f"train.neftune_noise_alpha={alpha}"])
    cut = replace(config, train=replace(config.train, micro_batch_size=2 * together))
    mesh, engine = build(cut)
    losses = []
    for step in range(5):
        parts = micro_batches(config, step)
        batches = [joined(parts[start : start + together]) for start in range(0, len(parts), together)]
        losses.append(training_step(cut, mesh, engine, batches, step=step, lr=1e-3).metrics["loss"])
    return losses


def _splits() -> list[list[float]]:
    return [_losses(1), _losses(2), _losses(4), _losses(1, "null")]


def test_losses_are_the_same_at_any_split_into_micro_batches() -> None:
    ((two, four, eight, without),) = run_ranks(1, _splits)
    assert two == pytest.approx(four, rel=1e-6)
    assert two == pytest.approx(eight, rel=1e-6)
    assert two != pytest.approx(without, rel=1e-4)

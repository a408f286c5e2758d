"""Random numbers depend only on seed, step, layer, place and sample, and pass statistical tests."""

from __future__ import annotations

import pytest
import torch

from moe.config.compose import load_config
from moe.model.transformer import Transformer
from moe.sparse.randomness import _GOLDEN, _MASK, Randomness, _mix, _mix_tensor, _signed


def _ids(*samples: int) -> torch.Tensor:
    return torch.tensor(samples)


def test_tensor_arithmetic_equals_unsigned_integers() -> None:
    values = [0, 1, 12345, _GOLDEN, _MASK, 1 << 63, (1 << 63) - 1]
    mixed = _mix_tensor(torch.tensor([_signed(value) for value in values]))
    assert mixed.tolist() == [_signed(_mix(value)) for value in values]


def test_a_sample_gets_the_same_numbers_in_any_batch() -> None:
    whole = Randomness.of(3, 7, _ids(10, 11, 12, 13)).fork(2).uniform(5, 6)
    for place, sample in enumerate((10, 11, 12, 13)):
        alone = Randomness.of(3, 7, _ids(sample)).fork(2).uniform(5, 6)
        assert torch.equal(alone[0], whole[place])


def test_every_argument_changes_the_numbers() -> None:
    first = Randomness.of(3, 7, _ids(10)).fork(2).uniform(64)
    others = [
        Randomness.of(4, 7, _ids(10)).fork(2),
        Randomness.of(3, 8, _ids(10)).fork(2),
        Randomness.of(3, 7, _ids(11)).fork(2),
        Randomness.of(3, 7, _ids(10)).fork(3),
        Randomness.of(3, 7, _ids(10)).fork(2).fork(0),
        Randomness.of(7, 3, _ids(10)).fork(2),
    ]
    for other in others:
        assert (other.uniform(64) == first).float().mean() < 0.1


def test_uniform_in_mean_spread_and_pairs() -> None:
    values = Randomness.of(0, 0, torch.arange(64)).uniform(4096)
    assert values.min() >= 0
    assert values.max() < 1
    counts = torch.histc(values, 64, 0, 1)
    expected = values.numel() / 64
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert 30 < chi_square < 110  # 63 degrees of freedom: ± 4 standard deviations
    for other in (values.roll(1, 0), values.roll(1, 1)):
        assert abs(torch.corrcoef(torch.stack([values.flatten(), other.flatten()]))[0, 1]) < 0.01


def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    dropped = Randomness.of(1, 2, torch.arange(8)).dropout(torch.ones(8, 64, 64), 0.25)
    assert (dropped == 0).float().mean() == pytest.approx(0.25, abs=0.01)
    assert dropped.mean() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("key", ["router.jitter_noise=0.1", "model.hidden_dropout=0.1"])
def test_in_a_model_noise_acts_in_training_only_and_needs_its_source(key: str) -> None:
    config = load_config([key, "model.hidden_size=32", "model.num_hidden_layers=2", "model.vocab_size=300",
                          "tokenizer.vocab_size=300"])  # fmt: skip
    model = Transformer(config.model, config.router, config.experts)
    model.init_weights(0)
    ids = torch.arange(24).view(2, 12)

    def logits(step: int) -> torch.Tensor:
        output = model(ids, randomness=Randomness.of(0, step, _ids(0, 1)))
        assert output.logits_BSV is not None
        return output.logits_BSV

    assert torch.equal(logits(0), logits(0))
    assert not torch.equal(logits(0), logits(1))
    with pytest.raises(ValueError, match=key.replace(".", r"\.") + " needs the batch's randomness"):
        model(ids)
    model.eval()
    assert torch.equal(logits(0), logits(1))
    assert torch.equal(logits(0), model(ids).logits_BSV)

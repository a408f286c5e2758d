"""The cross-entropy kernel, interpreted, against torch's in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

IGNORED = -100
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-7}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 4096, 9001])
def test_equals_torch(fused: SimpleNamespace, dtype: torch.dtype, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(5, vocab, generator=generator) * 5).to(dtype)
    labels = torch.tensor([0, vocab - 1, IGNORED, vocab // 2, IGNORED])
    wide = logits.double().requires_grad_()
    wanted = F.cross_entropy(wide, labels, ignore_index=IGNORED, reduction="none")
    (grad,) = torch.autograd.grad(wanted.sum(), wide)
    before = logits.clone()
    found = fused.cross_entropy.to_gradient(logits, labels, IGNORED, False)
    assert torch.equal(logits, before)
    assert torch.equal(fused.cross_entropy.to_gradient(logits, labels, IGNORED, True), found)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), grad, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    assert (logits[labels == IGNORED] == 0).all()


def test_large_and_infinite_logits(fused: SimpleNamespace) -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0], [float("-inf"), 2.0, 1.0], [-1e5, -1e5, -1e5]])
    labels = torch.tensor([1, 2, 0])
    wanted = F.cross_entropy(logits.double(), labels, reduction="none")
    found = fused.cross_entropy.to_gradient(logits, labels, IGNORED, True)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-2)  # float32 at 1e5
    assert logits.isfinite().all()


def test_nan_stays_in_its_row(fused: SimpleNamespace) -> None:
    logits = torch.randn(3, 70)
    logits[1, 5] = float("nan")
    losses = fused.cross_entropy.to_gradient(logits, torch.tensor([3, 4, 5]), IGNORED, True)
    assert losses.isnan().tolist() == [False, True, False]
    assert logits.isnan().any(1).tolist() == [False, True, False]


def test_no_rows(fused: SimpleNamespace) -> None:
    empty = torch.empty(0, dtype=torch.int64)
    assert fused.cross_entropy.to_gradient(torch.empty(0, 9), empty, IGNORED, True).shape == (0,)

"""The head's cross-entropy: against torch's over full logits, its gradients, ignored labels and slices."""

import pytest
import torch

from moe.kernels import cross_entropy
from moe.kernels.cross_entropy import cross_entropy_reference, linear_cross_entropy


def tensors(tokens=150, hidden=7, vocab=31, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[::4] = -100
    return x, weight, labels


def plain(x, weight, labels):
    return cross_entropy_reference(x @ weight.T, labels)


@pytest.mark.parametrize("elements", [1, 70 * 31, 1 << 21], ids=["64 rows", "70 rows", "one slice"])
def test_equals_torch_whatever_the_slices(monkeypatch, elements):
    monkeypatch.setitem(cross_entropy.SLICE_ELEMENTS, "cpu", elements)
    x, weight, labels = tensors()
    actual, expected = linear_cross_entropy(x, weight, labels), plain(x, weight, labels)
    torch.testing.assert_close(actual, expected)
    mine = torch.autograd.grad(actual * 0.3, (x, weight))
    other = torch.autograd.grad(expected * 0.3, (x, weight))
    for one, two in zip(mine, other, strict=True):
        torch.testing.assert_close(one, two)


def test_the_reference_is_the_definition():
    x, weight, labels = tensors()
    probs = torch.softmax(x @ weight.T, 1)
    expected = -sum(probs[row, label].log() for row, label in enumerate(labels.tolist()) if label != -100)
    torch.testing.assert_close(plain(x, weight, labels), expected)


def test_gradients():
    x, weight, labels = tensors(tokens=9, vocab=5)
    assert torch.autograd.gradcheck(lambda *t: linear_cross_entropy(*t, labels), (x, weight))


def test_all_labels_ignored_is_zero_with_zero_gradients():
    x, weight, labels = tensors()
    value = linear_cross_entropy(x, weight, torch.full_like(labels, -100))
    assert value.item() == 0
    assert all(grad.abs().max() == 0 for grad in torch.autograd.grad(value, (x, weight)))


def test_large_logits_do_not_overflow():
    x, weight, labels = tensors(dtype=torch.float32)
    wide = plain(x.double() * 1e4, weight.double(), labels)
    torch.testing.assert_close(linear_cross_entropy(x * 1e4, weight, labels).double(), wide, rtol=1e-5, atol=0)


def test_frozen_head_and_no_grad():
    x, weight, labels = tensors()
    weight.requires_grad_(False)
    (grad,) = torch.autograd.grad(linear_cross_entropy(x, weight, labels), (x,))
    torch.testing.assert_close(grad, torch.autograd.grad(plain(x, weight, labels), (x,))[0])
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, labels).requires_grad


def test_bfloat16_sums_in_float32():
    x, weight, labels = tensors(dtype=torch.bfloat16)
    value = linear_cross_entropy(x, weight, labels)
    expected = plain(x.double(), weight.double(), labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=5e-3, atol=0)
    mine, other = (torch.autograd.grad(v, (x, weight)) for v in (value, expected))
    for one, two in zip(mine, other, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), two.double(), rtol=0.05, atol=0.05)

"""RMSNorm: against the formula in float64, its gradients, and float32 statistics under bfloat16."""

import pytest
import torch

from moe.kernels.rms_norm import HandWrittenRMSNorm, rms_norm_reference
from moe.model.norm import RMSNorm


def formula(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.fixture
def norm():
    layer = RMSNorm(6, 1e-5).double()
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, 6))
    return layer


def test_equals_the_formula(norm):
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(norm(x), formula(x, norm.weight, 1e-5))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 0.02)]
)
def test_by_hand_equals_the_reference(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(size, generator=generator).to(dtype) for size in ((7, 5, 96), (96,), (7, 5, 96)))
    outcomes = []
    for function in (HandWrittenRMSNorm.apply, rms_norm_reference):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        y = function(*inputs, 1e-5)
        outcomes.append([y, *torch.autograd.grad(y, inputs, grad)])
    for mine, other in zip(*outcomes, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * other.abs().max().item())


def test_zero_rows_are_finite(norm):
    x = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    norm(x).sum().backward()
    assert norm(x).abs().max() == 0
    assert x.grad.isfinite().all()


def test_gradients(norm):
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def apply(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(apply, (x, norm.weight))


def test_bfloat16_statistics_are_float32():
    """Summed in bfloat16, the mean square of 4,096 values would be wrong by several percent."""
    x = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    layer = RMSNorm(4096, 1e-5).bfloat16()
    y = layer(x)
    y.float().square().sum().backward()
    wide = x.detach().double().requires_grad_()
    expected = formula(wide, layer.weight.double(), 1e-5)
    expected.square().sum().backward()
    assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=0)

"""The dense SwiGLU: against its plain reference, forward and gradients."""

import pytest
import torch

from moe.kernels.swiglu import swiglu, swiglu_reference


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.02)]
)
def test_equals_the_reference(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    gate, up, grad = (torch.randn(5, 3, 40, generator=generator).to(dtype) * 2 for _ in range(3))
    outcomes = []
    for function in (swiglu, swiglu_reference):
        inputs = [tensor.clone().requires_grad_() for tensor in (gate, up)]
        y = function(*inputs)
        outcomes.append([y, *torch.autograd.grad(y, inputs, grad)])
    for mine, other in zip(*outcomes, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def test_gradients():
    inputs = [torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(swiglu, inputs)

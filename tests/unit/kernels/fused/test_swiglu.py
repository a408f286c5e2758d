"""SwiGLU's kernels, interpreted, against the formula in float64 with autograd's backward pass."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-7}  # of the largest result
SHAPES = [(5, 1), (1, 7), (3, 1024), (4, 1025), (2, 3000), (0, 8)]
in_dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def inputs(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + width)
    gate_up = torch.randn(rows, 2 * width, generator=generator) * 3
    return gate_up.to(dtype), torch.randn(rows, width, generator=generator).to(dtype)


def expected(gate_up: Tensor, dact: Tensor) -> tuple[Tensor, Tensor]:
    """The activation, and the gradient of gate/up."""
    wide = gate_up.double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    act = F.silu(gate) * up
    (grad,) = torch.autograd.grad(act, wide, dact.double())
    return act.detach(), grad


def close(found: Tensor, wanted: Tensor) -> None:
    atol = TOLERANCES[found.dtype] * float(wanted.abs().max() if wanted.numel() else 0)
    torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCES[found.dtype], atol=atol)


@in_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(fused: SimpleNamespace, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate_up, dact = inputs(*shape, dtype)
    act, grad = expected(gate_up, dact)
    gate, up = gate_up.chunk(2, 1)
    close(fused.swiglu.swiglu(gate, up), act)
    for mine, other in zip(fused.swiglu.swiglu_backward(gate, up, dact), grad.chunk(2, 1), strict=True):
        close(mine, other)
    mine = fused.swiglu.activation_backward(gate_up, dact.clone())
    close(mine[0], act)
    close(mine[1], grad)
    assert mine[2] is None


@in_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_weights_equals_the_formula(fused: SimpleNamespace, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate_up, dact = inputs(*shape, dtype)
    weights = torch.rand(shape[0], generator=torch.Generator().manual_seed(2))
    act, _ = expected(gate_up, dact)
    _, grad = expected(gate_up.double(), dact.double() * weights.unsqueeze(1))
    found = fused.swiglu.activation_backward(gate_up, dact.clone(), weights)
    close(found[0], act * weights.unsqueeze(1))
    close(found[1], grad)
    assert found[2].dtype == torch.float32
    torch.testing.assert_close(found[2].double(), (act * dact).sum(1), rtol=1e-5, atol=1e-5)


@in_dtypes
def test_strided_inputs_and_leading_dimensions(fused: SimpleNamespace, dtype: torch.dtype) -> None:
    gate_up, dact = (tensor.view(2, 3, -1) for tensor in inputs(6, 40, dtype))
    act, grad = expected(gate_up, dact)
    gate, up = gate_up.chunk(2, -1)
    far = torch.full((2, 3, 80), float("nan"), dtype=dtype)[..., ::2].copy_(dact)  # elements aren't adjacent
    turned = up.transpose(0, 1).contiguous().transpose(0, 1)  # rows aren't in order
    close(fused.swiglu.swiglu(gate, turned), act)
    for mine, other in zip(fused.swiglu.swiglu_backward(gate, turned, far), grad.chunk(2, -1), strict=True):
        close(mine, other)
    expanded = torch.ones((), dtype=dtype).expand(6, 40)  # the gradient of a sum
    mine = fused.swiglu.activation_backward(gate_up.view(6, 80), expanded)
    close(mine[1], expected(gate_up, torch.ones(2, 3, 40))[1].view(6, 80))
    assert (expanded == 1).all()  # not overwritten


def test_large_values_stay_finite(fused: SimpleNamespace) -> None:
    gate = torch.tensor([[-1e4, -100.0, -88.0, 0.0, 88.0, 1e4]])
    ones = torch.ones_like(gate)
    close(fused.swiglu.swiglu(gate, ones), F.silu(gate.double()))
    dgate, dup = fused.swiglu.swiglu_backward(gate, ones, ones)
    act, grad = expected(torch.cat((gate, ones), 1), ones)
    close(dgate, grad[:, :6])
    close(dup, act)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(fused: SimpleNamespace, value: float) -> None:
    gate_up, dact = inputs(2, 9, torch.float32)
    gate_up[1, 4] = value
    act, grad, _ = fused.swiglu.activation_backward(gate_up, dact)
    wanted = expected(gate_up, inputs(2, 9, torch.float32)[1])
    for mine, other in zip((act, grad), wanted, strict=True):
        assert torch.equal(mine.isfinite(), other.isfinite())


def test_a_gradient_check_of_the_backward_kernel(fused: SimpleNamespace) -> None:
    """Differences of the forward kernel in float32, along one direction."""
    gate_up, dact = inputs(3, 50, torch.float32)
    direction, step = torch.randn(3, 100, generator=torch.Generator().manual_seed(1)), 1e-2
    ahead, behind = (fused.swiglu.swiglu(*(gate_up + sign * step * direction).chunk(2, 1)).double() for sign in (1, -1))
    slope = ((ahead - behind) * dact).sum() / (2 * step)
    _, grad, _ = fused.swiglu.activation_backward(gate_up, dact.clone())
    torch.testing.assert_close((grad.double() * direction).sum(), slope, rtol=1e-3, atol=1e-3)

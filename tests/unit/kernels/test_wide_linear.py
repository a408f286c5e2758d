"""A router's product: float32 values and gradients, and nothing wide is kept of narrow factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe.kernels.wide_linear import wide_linear

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16), (0, 16)], ids=str)
def test_equals_a_linear_layer_of_widened_factors(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(one, generator=generator).to(dtype).requires_grad_() for one in (shape, (8, 16))]
    wide = torch.promote_types(dtype, torch.float32)
    results = []
    for product in (wide_linear, lambda x, w: F.linear(x.to(wide), w.to(wide))):
        y = product(*factors)
        results.append((y, *torch.autograd.grad(y.square().sum(), factors)))
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype is plain.dtype
        torch.testing.assert_close(ours, plain, rtol=1e-6 if ours.dtype is wide else 1e-2, atol=1e-6)


def test_narrow_factors_are_kept_as_they_came() -> None:
    kept: list[Tensor] = []
    x, weight = (torch.randn(shape).bfloat16().requires_grad_() for shape in ((64, 16), (8, 16)))
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        y = wide_linear(x, weight)
    assert y.dtype is torch.float32
    assert {one.dtype for one in kept} == {torch.bfloat16}
    assert {one.data_ptr() for one in kept} == {x.data_ptr(), weight.data_ptr()}

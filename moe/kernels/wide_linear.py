"""A linear layer that computes in float32 and keeps its factors as they came, for the backward pass.

A router's logits are float32 products whatever the model's dtype. Autograd would keep the widened input, [T, H] in
float32, beside the narrow one that the experts' gathering keeps anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe.kernels.policy import wide_dtype


def wide_linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x [..., I] · weightᵀ → [..., O], float32 (float64 for float64 factors). Values and gradients are those of
    `F.linear` of the widened factors."""
    if x.dtype == weight_OI.dtype == wide_dtype(x.dtype):
        return F.linear(x, weight_OI)
    return _WideLinear.apply(x, weight_OI)  # type: ignore[return-value]


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return F.linear(*_widened(x, weight_OI))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        wide, wide_OI = _widened(x, weight_OI)
        grad_TO, wide_TI = grads[0].flatten(0, -2), wide.flatten(0, -2)
        grad_x = (grad_TO @ wide_OI).view(x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_w = (grad_TO.t() @ wide_TI).to(weight_OI.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w


def _widened(x: Tensor, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    dtype = wide_dtype(torch.promote_types(x.dtype, weight_OI.dtype))
    return x.to(dtype), weight_OI.to(dtype)

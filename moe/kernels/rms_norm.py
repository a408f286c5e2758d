"""RMSNorm (arXiv 1910.07467) with statistics in float32, also for narrower activations.

CUDA runs torch's fused kernel, other devices a hand-written backward pass.
Legend: T tokens (any leading dimensions), H the normalised dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.kernels.policy import widen


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x²) + eps) · weight` over the last dimension, in x's dtype."""
    if x_TH.is_cuda:  # one fused kernel, which computes in float32 too
        return F.rms_norm(x_TH, weight_H.shape, weight_H, eps)
    return HandWrittenRMSNorm.apply(x_TH, weight_H, eps)  # type: ignore[return-value]


def rms_norm_reference(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """The definition, with autograd's own backward pass."""
    wide_TH = widen(x_TH)
    return (wide_TH * (wide_TH.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_H).to(x_TH.dtype)


class HandWrittenRMSNorm(torch.autograd.Function):
    """y = x·r·w with r = (mean(x²) + eps)^−½, so dx = r·(g·w) − x·r³/H·Σ(g·w·x) and dw = Σ_T g·x·r.

    Hand-written because autograd makes one pass over memory per element-wise step and takes twice as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        wide_TH = widen(x_TH)
        square_T1 = torch.linalg.vector_norm(wide_TH, dim=-1, keepdim=True).square_()
        r_T1 = square_T1.div_(x_TH.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TH, weight_H, r_T1)
        y_TH = wide_TH * r_T1 if wide_TH is x_TH else wide_TH.mul_(r_T1)  # a widened copy may be overwritten
        return y_TH.mul_(weight_H.to(r_T1.dtype)).to(x_TH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        x_TH, weight_H, r_T1 = ctx.saved_tensors
        hidden, dtype = x_TH.shape[-1], x_TH.dtype
        wide_TH, grad_TH, w_H = widen(x_TH), widen(grads[0]), weight_H.to(r_T1.dtype)
        product_TH = grad_TH * wide_TH
        grad_weight_H = r_T1.reshape(-1) @ product_TH.reshape(-1, hidden)
        dot_T1 = (product_TH @ w_H).unsqueeze(-1)
        grad_x_TH = torch.mul(grad_TH, w_H, out=product_TH).mul_(r_T1)
        grad_x_TH.addcmul_(wide_TH, r_T1.pow(3).mul_(dot_T1).div_(-hidden))
        return grad_x_TH.to(dtype), grad_weight_H.to(weight_H.dtype), None

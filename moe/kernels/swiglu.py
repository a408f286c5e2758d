"""The dense SwiGLU activation (arXiv 2002.05202), silu(gate) · up, on every device. For experts: `grouped_swiglu`.

On CUDA Triton's kernels compute it where `runs_fused` says so.

Legend: T tokens (any leading dimensions), F feed-forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.kernels.policy import runs_fused


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) · up, element by element."""
    return HandWrittenSwiGLU.apply(gate_TF, up_TF)  # type: ignore[return-value]


def swiglu_reference(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """The definition, with autograd's own backward pass."""
    return F.silu(gate_TF) * up_TF


def activation(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) · up without autograd."""
    if runs_fused(gate_TF):
        from moe.kernels.fused import swiglu as fused

        return fused.swiglu(gate_TF, up_TF)
    return F.silu(gate_TF).mul_(up_TF)


def swiglu_backward(gate_TF: Tensor, up_TF: Tensor, grad_TF: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    if runs_fused(gate_TF):
        from moe.kernels.fused import swiglu as fused

        return fused.swiglu_backward(gate_TF, up_TF, grad_TF)
    return torch.ops.aten.silu_backward(grad_TF * up_TF, gate_TF), F.silu(gate_TF).mul_(grad_TF)


class HandWrittenSwiGLU(torch.autograd.Function):
    """Saves only its two inputs: silu and the product are cheaper to recompute than to store."""

    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TF, up_TF)
        return activation(gate_TF, up_TF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        gate_TF, up_TF = ctx.saved_tensors
        return swiglu_backward(gate_TF, up_TF, grads[0])

"""The SwiGLU activation (arXiv 2002.05202), silu(gate) · up, and its backward pass, on every device.

On CUDA Triton's kernels compute it where `runs_fused` says so. `activation_backward` is for experts (`expert_swiglu`);
its arithmetic is float32 for narrower dtypes.

Legend: T tokens (any leading dimensions), N rows of experts, F feed-forward, G = 2F (gate, then up).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.kernels.policy import runs_fused, wide_dtype

BLOCK_ROWS = 128  # that a CPU takes through the element-wise passes at a time, so that they stay in a core's cache


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


def activation_backward(
    gate_up_NG: Tensor,
    dact_NF: Tensor,
    weights_N: Tensor | None = None,
    scratch: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(a = silu(g) ⊙ u [N, F], gradient of gate/up [N, G], None) from gate/up and the gradient of a.

    With `weights_N`, rows are used with a weight w and `dact_NF` is the gradient of w a:
    (w a, gradient of gate/up, gradient of w [N]).

    In plain PyTorch several element-wise passes, in place to use less cache: `dact_NF` may be overwritten. If `scratch`
    (buffers of at least N rows) is given, the first two results are views of it.
    """
    if scratch is None and runs_fused(gate_up_NG):
        from moe.kernels.fused import swiglu as fused

        return fused.activation_backward(gate_up_NG, dact_NF, weights_N)
    dtype, work, rows = gate_up_NG.dtype, wide_dtype(gate_up_NG.dtype), dact_NF.shape[0]
    if scratch is None:
        scratch = torch.empty_like(dact_NF), torch.empty_like(gate_up_NG)
    act_NF, dgate_up_NG = (buffer[:rows] for buffer in scratch)
    dweights_N = None if weights_N is None else torch.empty_like(weights_N)
    block = min(BLOCK_ROWS, rows) if gate_up_NG.device.type == "cpu" else rows
    # Buffers that all blocks use: new ones for each would cost page faults.
    wide = (
        [] if dtype == work else [one.new_empty(block, one.shape[1], dtype=work) for one in (act_NF, dgate_up_NG) * 2]
    )
    for start in range(0, rows, max(1, block)):
        at = slice(start, min(start + block, rows))
        weights = None if weights_N is None or dweights_N is None else (weights_N[at], dweights_N[at])
        if dtype == work:
            _activation_backward_into(act_NF[at], dgate_up_NG[at], gate_up_NG[at], dact_NF[at], weights)
            continue
        act, dgate_up, dact, gate_up = (one[: at.stop - start] for one in wide)
        gate_up.copy_(gate_up_NG[at])
        dact.copy_(dact_NF[at])
        _activation_backward_into(act, dgate_up, gate_up, dact, weights)
        act_NF[at], dgate_up_NG[at] = act, dgate_up
    return act_NF, dgate_up_NG, dweights_N


def _activation_backward_into(
    act_NF: Tensor,
    dgate_up_NG: Tensor,
    gate_up_NG: Tensor,
    dact_NF: Tensor,
    weights: tuple[Tensor, Tensor] | None,
) -> None:
    """Writes the results to the first two and to the second of `weights`; overwrites `dact_NF`."""
    (gate_NF, up_NF), (dgate_NF, dup_NF) = gate_up_NG.chunk(2, dim=1), dgate_up_NG.chunk(2, dim=1)
    if weights is None:
        torch.ops.aten.silu.out(gate_NF, out=act_NF)
        torch.mul(dact_NF, act_NF, out=dup_NF)
        act_NF.mul_(up_NF)
        dact_NF.mul_(up_NF)
        torch.ops.aten.silu_backward.grad_input(dact_NF, gate_NF, grad_input=dgate_NF)
        return
    torch.sigmoid(gate_NF, out=dgate_NF)  # the one exponential: a CPU takes six times as long for it as for a product
    torch.mul(gate_NF, dgate_NF, out=dup_NF)  # silu
    torch.mul(dup_NF, up_NF, out=act_NF)
    torch.lerp(dup_NF, dup_NF.new_ones(()), dgate_NF, out=dgate_NF)  # silu's derivative: silu + σ (1 − silu)
    weights_N, dweights_N = weights
    dweights_N.copy_((dact_NF * act_NF).sum(1))
    act_NF.mul_(weights_N.unsqueeze(1))
    dact_NF.mul_(weights_N.unsqueeze(1))
    dup_NF.mul_(dact_NF)
    dgate_NF.mul_(dact_NF.mul_(up_NF))

"""The dense feed-forward block: SwiGLU (arXiv 2002.05202).

Legend: B batch, S sequence, H hidden, F feed-forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · up, keeping only its two inputs: the product and silu are cheaper to redo than to store."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0] * up, gate), F.silu(gate).mul_(grads[0])


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, element by element."""
    return _SwiGLU.apply(gate, up)  # type: ignore[return-value]


class DenseMLP(nn.Module):
    """`down(silu(gate(x)) · up(x))`, no biases."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x_BSH), self.up_proj(x_BSH)))

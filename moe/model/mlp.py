"""The dense feed-forward block: SwiGLU (arXiv 2002.05202).

Legend: B batch, S sequence, H hidden, F feed-forward.
"""

from __future__ import annotations

from torch import Tensor, nn

from moe.kernels.swiglu import swiglu
from moe.model.linear import project


class DenseMLP(nn.Module):
    """`down(silu(gate(x)) · up(x))`, no biases."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return project(self.down_proj, swiglu(project(self.gate_proj, x_BSH), project(self.up_proj, x_BSH)))

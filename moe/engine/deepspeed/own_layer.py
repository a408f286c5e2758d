"""DeepSpeed's own sparse layer with the weights of ours, for benchmarks; no run uses it.

It is set so that it computes what ours does: no choice is dropped, and a token's second expert is its second-best one
(by default DeepSpeed draws it, with Gumbel noise). Each expert's rows are then padded to those of the fullest expert.
On one rank it needs no process group.

Its auxiliary loss can't agree: with two choices per token it counts first choices only, ours counts all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from torch import Tensor, nn
from torch.nn import functional as F

from moe.sparse.layer import SparseMLP


class SwiGLUExpert(nn.Module):
    """One expert as a module, as DeepSpeed takes them: gate and up in one product, then down."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class DeepSpeedLayer:
    """`deepspeed.moe.layer.MoE` with copies of `layer`'s weights, in their dtype. `layer` has a top-k router with
    normalised weights, all experts on this rank, and none that are shared."""

    def __init__(self, layer: SparseMLP) -> None:
        gate: Any = layer.gate
        gate_up_proj, down_proj = layer.experts.gate_up_proj, layer.experts.down_proj
        num_experts, hidden_size, intermediate_size = down_proj.shape
        self._module = MoE(
            hidden_size,
            SwiGLUExpert(hidden_size, intermediate_size),
            num_experts=num_experts,
            k=gate.config.top_k,
            drop_tokens=False,
            top2_2nd_expert_sampling=False,
        ).to(down_proj.dtype)
        inner: Any = self._module.deepspeed_moe
        experts = inner.experts.deepspeed_experts
        # The router's weight, then each expert's gate_up, then each expert's down.
        self.weights: list[Tensor] = [
            inner.gate.wg.weight,
            *(expert.gate_up.weight for expert in experts),
            *(expert.down.weight for expert in experts),
        ]
        with torch.no_grad():
            for own, ours in zip(self.weights, [gate.weight, *gate_up_proj, *down_proj], strict=True):
                own.copy_(ours)

    def __call__(self, x_BSH: Tensor) -> Tensor:
        """x [B, S, H] → y [B, S, H]."""
        y_BSH, _, _ = self._module(x_BSH)
        return y_BSH

    def stacked(self, per_weight: Sequence[Tensor]) -> list[Tensor]:
        """Of tensors in the order of `weights`, three in the shapes of our layer's weights: router, gate_up_proj,
        down_proj."""
        router, *others = per_weight
        half = len(others) // 2
        return [router, torch.stack(others[:half]), torch.stack(others[half:])]

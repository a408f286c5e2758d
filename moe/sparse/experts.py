"""Experts: many SwiGLU feed-forwards as two stacked weights, computed on rows sorted by expert.

Shapes: T tokens, N rows sorted by expert, H hidden, F feed-forward, E experts held by this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from moe.config import ExpertsConfig
from moe.kernels.expert_backends import resolve_backend
from moe.kernels.grouped_swiglu import grouped_ffn
from moe.kernels.permute import Combination


class Experts(nn.Module):
    """`num_experts` SwiGLU experts, of which this rank holds `num_local` starting at global index `first_expert`.

    gate_up_proj [E, 2F, H] holds w1 over w3 (gate, then up), down_proj [E, H, F] w2: transformers 5's names and layout.
    Stacked, so that every parameter gets a gradient even when an expert received no token.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_local: int, config: ExpertsConfig, *, first_expert: int = 0
    ) -> None:
        super().__init__()
        self.config, self.first_expert = config, first_expert
        self.gate_up_proj = nn.Parameter(torch.empty(num_local, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_local, hidden_size, intermediate_size))
        nn.init.normal_(self.gate_up_proj, std=0.02)
        nn.init.normal_(self.down_proj, std=0.02)

    takes_tokens = True  # and their combination, instead of rows

    @property
    def sums(self) -> bool:
        """Whether combinations should have weights. The weights' gradients are then other sums than for rows that other
        ranks sent, equal up to rounding, and results must not depend on the expert-parallel size: so not in float32,
        nor with float8 factors."""
        return self.gate_up_proj.dtype is torch.bfloat16 and not self.config.fp8

    def draws(self, seed_for: Callable[[str, int], int]) -> Iterator[tuple[str, Tensor, int]]:
        """(parameter name, one expert's weight [O, I], the seed of its initial values), the last from
        `seed_for(parameter name, global expert)`.

        The values don't depend on the expert-parallel size.
        """
        for name in ("gate_up_proj", "down_proj"):
            for local, weight in enumerate(getattr(self, name)):
                yield name, weight, seed_for(name, self.first_expert + local)

    def forward(self, x: Tensor, counts_E: Tensor, combination: Combination | None = None) -> Tensor:
        """Apply expert e to its `counts_E[e]` consecutive rows of x [N, H]; returns [N, H]. With a `combination` x is
        [T, H]; if it has weights, returns each token's sum [T, H]. `experts.fp8` holds in training mode."""
        shapes = (self.down_proj.shape[1], self.down_proj.shape[2])
        backend, _ = resolve_backend(self.config, x.device, x.dtype, shapes)
        fp8 = self.config.fp8 and self.training
        return grouped_ffn(x, counts_E, self.gate_up_proj, self.down_proj, backend, combination, fp8=fp8)

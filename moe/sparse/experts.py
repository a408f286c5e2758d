"""Experts: many SwiGLU feed-forwards as two stacked weights, computed on rows sorted by expert.

Shapes: N rows sorted by expert, H hidden, F feed-forward, E experts held by this rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.config import ExpertBackend, ExpertsConfig


class Experts(nn.Module):
    """`num_experts` SwiGLU experts, of which this rank holds `num_local` starting at global index `first_expert`.

    gate_up_proj [E, 2F, H] holds w1 over w3 (gate, then up), down_proj [E, H, F] w2: transformers 5's names and layout.
    Stacked, so that every parameter gets a gradient even when an expert saw no token.
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

    @torch.no_grad()
    def reset_parameters(self, std: float, seed_for: Callable[[str, int], int]) -> None:
        """Fill with N(0, std²), each expert from its own generator `seed_for(parameter name, global expert index)`.

        Drawn on the CPU in float32, so the values depend on neither the device nor the expert-parallel degree.
        """
        generator = torch.Generator()
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(self, name)
            for local in range(weight.shape[0]):
                generator.manual_seed(seed_for(name, self.first_expert + local))
                weight[local].copy_(torch.empty(weight.shape[1:]).normal_(0, std, generator=generator))

    def forward(self, x_NH: Tensor, counts_E: Tensor) -> Tensor:
        """Apply expert e to its `counts_E[e]` consecutive rows of x [N, H]; returns [N, H]."""
        shapes = (self.down_proj.shape[1], self.down_proj.shape[2])
        backend, _ = resolve_backend(self.config, x_NH.device, x_NH.dtype, shapes)
        return grouped_ffn(x_NH, counts_E, self.gate_up_proj, self.down_proj, backend)


def resolve_backend(
    config: ExpertsConfig, device: torch.device, dtype: torch.dtype, shapes: tuple[int, int]
) -> tuple[ExpertBackend, str]:
    """The back-end that will run, and why, for a start-up log; `shapes` is (hidden_size, intermediate_size).

    Raises ValueError when `experts.backend` names one that can't run here.
    """
    if config.backend is ExpertBackend.loop:
        return ExpertBackend.loop, "set by experts.backend"
    if config.backend is ExpertBackend.megablocks:
        raise ValueError("experts.backend=megablocks needs CUDA: use experts.backend=auto")
    aligned = all(size * dtype.itemsize % 16 == 0 for size in shapes)
    if dtype in (torch.float32, torch.bfloat16) and aligned:
        return ExpertBackend.grouped_mm, "float32 or bfloat16 with 16-byte aligned rows"
    if config.backend is ExpertBackend.grouped_mm:
        raise ValueError(
            f"experts.backend=grouped_mm needs float32 or bfloat16 rows of 16 bytes·n, not {dtype} {shapes}"
        )
    return ExpertBackend.loop, f"{dtype}, {shapes}: grouped_mm can't run"


def grouped_ffn(
    x_NH: Tensor, counts_E: Tensor, gate_up_proj: Tensor, down_proj: Tensor, backend: ExpertBackend
) -> Tensor:
    """down(silu(gate(x)) · up(x)) of each row's expert; x [N, H] sorted by expert, N = counts_E.sum()."""
    if backend is ExpertBackend.loop:
        return loop_ffn(x_NH, counts_E, gate_up_proj, down_proj)
    offsets_E = counts_E.cumsum(0).to(torch.int32)
    gate_up_NG = F.grouped_mm(x_NH, gate_up_proj.transpose(1, 2), offs=offsets_E)
    gate_NF, up_NF = gate_up_NG.chunk(2, dim=1)
    return F.grouped_mm(F.silu(gate_NF) * up_NF, down_proj.transpose(1, 2), offs=offsets_E)


def loop_ffn(x_NH: Tensor, counts_E: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """The oracle: one plain SwiGLU per expert, any dtype and shape, autograd's own backward."""
    outputs = []
    for rows_H, gate_up, down in zip(x_NH.split(counts_E.tolist()), gate_up_proj, down_proj, strict=True):
        gate_F, up_F = F.linear(rows_H, gate_up).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate_F) * up_F, down))
    return torch.cat(outputs)

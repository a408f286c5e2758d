"""Experts: many SwiGLU feed-forwards as two stacked weights, computed on rows sorted by expert.

Shapes: N rows sorted by expert, H hidden, F feed-forward, E experts held by this rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.config import ExpertBackend, ExpertsConfig
from moe.errors import UserError
from moe.sparse import megablocks
from moe.sparse.swiglu import GroupedSwiGLU, PerExpertSwiGLU, torch_products


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

    def backend_for(self, x: Tensor) -> ExpertBackend:
        """The back-end that runs on x's device and dtype; raises UserError like `resolve_backend`."""
        shapes = (self.down_proj.shape[1], self.down_proj.shape[2])
        return resolve_backend(self.config, x.device, x.dtype, shapes)[0]

    def forward(self, x_NH: Tensor, counts_E: Tensor) -> Tensor:
        """Apply expert e to its `counts_E[e]` consecutive rows of x [N, H]; returns [N, H]."""
        return grouped_ffn(x_NH, counts_E, self.gate_up_proj, self.down_proj, self.backend_for(x_NH))


def resolve_backend(
    config: ExpertsConfig, device: torch.device, dtype: torch.dtype, shapes: tuple[int, int]
) -> tuple[ExpertBackend, str]:
    """The back-end that will run, and why, for a start-up log; `shapes` is (hidden_size, intermediate_size).

    `auto` takes grouped_mm where it runs and else the loop. Raises UserError, saying what is missing, when
    `experts.backend` names one that can't run here.
    """
    asked = config.backend
    if asked is ExpertBackend.loop:
        return asked, "set by experts.backend"
    if asked is ExpertBackend.megablocks:
        megablocks.require(device, dtype)
        return asked, "set by experts.backend"
    obstacle = _grouped_mm_obstacle(device, dtype, shapes)
    if obstacle is None:
        how = "torch's grouped_mm" if device.type == "cuda" else "one product per expert, as torch's grouped_mm on CPU"
        return ExpertBackend.grouped_mm, how
    if asked is ExpertBackend.grouped_mm:
        raise UserError(f"experts.backend=grouped_mm {obstacle}; use experts.backend=auto or loop")
    return ExpertBackend.loop, f"grouped_mm {obstacle}"


def _grouped_mm_obstacle(device: torch.device, dtype: torch.dtype, shapes: tuple[int, int]) -> str | None:
    """Why grouped_mm can't run, or None. On a CPU it has no rule of its own."""
    if device.type != "cuda":
        return None
    if dtype is not torch.bfloat16:
        return f"must have bfloat16 rows on CUDA, not {str(dtype).removeprefix('torch.')}"
    if any(size * dtype.itemsize % 16 for size in shapes):
        return f"must have 16-byte aligned rows: hidden and intermediate size {shapes} must be multiples of 8"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "must have a GPU of compute capability 8.0 or newer"
    return None


def grouped_ffn(
    x_NH: Tensor, counts_E: Tensor, gate_up_proj: Tensor, down_proj: Tensor, backend: ExpertBackend
) -> Tensor:
    """down(silu(gate(x)) · up(x)) of each row's expert; x [N, H] sorted by expert, N = counts_E.sum().

    Reads the counts on the host: one small synchronisation on CUDA, in exchange for exact shapes.
    """
    counts = counts_E.tolist()
    if backend is ExpertBackend.loop:
        return loop_ffn(x_NH, counts, gate_up_proj, down_proj)
    if x_NH.device.type != "cuda" or x_NH.shape[0] == 0:
        return PerExpertSwiGLU.apply(x_NH, gate_up_proj, down_proj, counts)  # type: ignore[no-any-return]
    if backend is ExpertBackend.megablocks:
        products = megablocks.products(counts)
    else:
        products = torch_products(counts, x_NH.device)
    return GroupedSwiGLU.apply(x_NH, gate_up_proj, down_proj, counts, products)  # type: ignore[no-any-return]


def loop_ffn(x_NH: Tensor, counts: list[int], gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """The oracle: one plain SwiGLU per expert, any dtype, device and shape, with autograd's own backward."""
    outputs = []
    for rows_H, gate_up, down in zip(x_NH.split(counts), gate_up_proj, down_proj, strict=True):
        gate_F, up_F = F.linear(rows_H, gate_up).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate_F) * up_F, down))
    return torch.cat(outputs)

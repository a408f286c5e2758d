"""LoRA's modules: a low-rank addition to a weight, and the layers that use it in place of the model's own.

They keep the names of the weights that they adapt, so that a checkpoint of the model fits: `q_proj.weight` beside
`q_proj.lora.A`, `q_proj.lora.B`. Legend: R rank, I and O sizes before and after a product, E experts of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.config import ExpertBackend
from moe.kernels.bfloat16_products import linear
from moe.kernels.grouped_lora import ALIGNED, LowRankPair, lora_ffn
from moe.kernels.permute import Combination
from moe.sparse import Experts, Randomness


class LowRank(nn.Module):
    """s·B·A [O, I] with A [R, I] and B [O, R]; of experts each stacked along a first dimension."""

    def __init__(self, shape: Sequence[int], rank: int, scale: float, device: torch.device) -> None:
        super().__init__()
        *experts, out_size, in_size = shape
        self.A = nn.Parameter(torch.empty(*experts, rank, in_size, device=device))
        self.B = nn.Parameter(torch.zeros(*experts, out_size, rank, device=device))
        self.scale = scale

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    def draw(self, seeds: Sequence[int]) -> None:
        """Initial values, one seed an expert: A uniform in ±1/√I (Kaiming's with a = √5, as peft has it), B zero."""
        bound = 1 / math.sqrt(self.A.shape[-1])
        with torch.no_grad():
            for a_RI, seed in zip(self.A.view(-1, *self.A.shape[-2:]), seeds, strict=True):
                generator = torch.Generator().manual_seed(seed)
                a_RI.copy_(torch.empty(a_RI.shape).uniform_(-bound, bound, generator=generator))
            self.B.zero_()

    def product(self) -> Tensor:
        """s·B·A, [O, I] or [E, O, I]."""
        return self.scale * (self.B @ self.A)

    def forward(self, x: Tensor) -> Tensor:
        """s·B·A·x for x [..., I]."""
        dtype = x.dtype
        return self.scale * F.linear(F.linear(x, self.A.to(dtype)), self.B.to(dtype))

    def pair(self) -> LowRankPair:
        """A and B of experts, with rows of zeros up to a rank that grouped products take."""
        missing = -self.rank % ALIGNED
        return LowRankPair(F.pad(self.A, (0, 0, 0, missing)), F.pad(self.B, (0, missing)), self.scale)


class LoRALinear(nn.Linear):
    """W x + s·B·A·x with the frozen weight of `base`; with DoRA times each row's trained length over its own."""

    takes_randomness = True

    def __init__(self, base: nn.Linear, low_rank: LowRank, *, dropout: float = 0.0, dora: bool = False) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.lora, self.dropout = base.weight, low_rank, dropout
        self.magnitude = nn.Parameter(torch.empty(base.out_features, device=base.weight.device)) if dora else None

    def reset_magnitude(self) -> None:
        """The length of each row of W, with which DoRA computes as W does; call once W has its values."""
        if self.magnitude is not None:
            with torch.no_grad():
                self.magnitude.copy_(self.weight.float().norm(dim=1))

    def forward(self, x_BSI: Tensor, randomness: Randomness | None = None) -> Tensor:
        """`randomness` is needed in training with dropout."""
        dropped = x_BSI
        if self.dropout and self.training:
            if randomness is None:
                raise ValueError(f"adapter.lora_dropout={self.dropout} needs the batch's randomness")
            dropped = randomness.dropout(x_BSI, self.dropout)
        y_BSO = linear(x_BSI, self.weight) + self.lora(dropped)
        if self.magnitude is None:
            return y_BSO
        # The length is a constant of the backward pass (arXiv 2402.09353, §4.3).
        length_O = (self.weight.detach().float() + self.lora.product().detach().float()).norm(dim=1)
        return y_BSO * (self.magnitude / length_O).to(y_BSO.dtype)


class LoRAExperts(Experts):
    """`base` with frozen weights and an A and a B for each expert and weight."""

    takes_tokens = False

    def __init__(self, base: Experts, gate_up: LowRank, down: LowRank) -> None:
        nn.Module.__init__(self)
        self.config, self.first_expert = base.config, base.first_expert
        self.gate_up_proj, self.down_proj = base.gate_up_proj, base.down_proj
        self.gate_up_proj_lora, self.down_proj_lora = gate_up, down

    def forward(self, x: Tensor, counts_E: Tensor, combination: Combination | None = None) -> Tensor:
        """As `Experts.forward` of rows [N, H]. Raises ValueError with a combination."""
        if combination is not None:
            raise ValueError("experts with adapters take rows, not tokens with their combination")
        pairs = self.gate_up_proj_lora.pair(), self.down_proj_lora.pair()
        loop = self.config.backend is ExpertBackend.loop
        return lora_ffn(x, counts_E, self.gate_up_proj, self.down_proj, *pairs, loop=loop)

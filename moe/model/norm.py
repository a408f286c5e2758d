"""The norms of the decoder, all created by `build_norm`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) · weight` over the last dimension (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x_TH: Tensor) -> Tensor:
        return rms_norm(x_TH, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def build_norm(config: ModelConfig, size: int) -> nn.Module:
    """The norm that `config` asks for, over a last dimension of `size`."""
    return RMSNorm(size, config.rms_norm_eps)

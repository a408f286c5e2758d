"""Noisy top-k: normal noise on the logits, of a deviation that the router learns for each token and expert.

Shapes: T tokens, H hidden, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.config import NoisyTopKRouterConfig
from moe.kernels.wide_linear import wide_linear
from moe.sparse.randomness import Randomness
from moe.sparse.routers.token_choice import NOISE, TokenChoiceRouter


class NoisyTopKRouter(TokenChoiceRouter):
    """x W + ε · softplus(x W_noise), ε ~ N(0, noise_std²), in training only (arXiv 1701.06538, eq. 4)."""

    config: NoisyTopKRouterConfig

    def __init__(self, hidden_size: int, config: NoisyTopKRouterConfig) -> None:
        super().__init__(hidden_size, config)
        self.noise_weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        nn.init.normal_(self.noise_weight, std=0.02)

    def noisy(
        self, logits_TE: Tensor, input_TH: Tensor, sequences: torch.Size, randomness: Randomness | None
    ) -> Tensor:
        if not self.training:
            return logits_TE
        std = self.at("noise_std")  # also at 0 the noise's weight gets a gradient: ZeRO could not reduce a missing one
        source = self.needed(randomness, "noise_std").fork(NOISE)
        normal_TE = source.normal(sequences[1], logits_TE.shape[1]).flatten(0, 1).to(logits_TE.dtype)
        deviation_TE = F.softplus(wide_linear(input_TH, self.trained(self.noise_weight)))
        return logits_TE + std * normal_TE * deviation_TE

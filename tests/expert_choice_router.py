"""A router for tests whose tokens have any number of experts, also none: each expert chooses its tokens.

Each expert takes its S·k/E most probable tokens of every sequence (expert choice, arXiv 2202.09368).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.config import TopKRouterConfig
from moe.sparse.randomness import Randomness
from moe.sparse.routers import Choices, Router, RouterOutput


class ExpertChoiceRouter(Router):
    def __init__(self, hidden_size: int, config: TopKRouterConfig) -> None:
        super().__init__(hidden_size, config)
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))

    @property
    def keeps_balance(self) -> bool:
        return True

    def forward(self, x_BSH: Tensor, randomness: Randomness | None = None) -> RouterOutput:
        del randomness
        experts, length = self.config.num_experts, x_BSH.shape[1]
        dtype = torch.promote_types(x_BSH.dtype, torch.float32)
        logits_BSE = F.linear(x_BSH.to(dtype), self.weight.to(dtype))
        probs_BSE = logits_BSE.softmax(-1)
        best_BCE = probs_BSE.topk(length * self.config.top_k // experts, dim=1).indices
        taken_BSE = torch.zeros_like(probs_BSE, dtype=torch.bool).scatter(1, best_BCE, True)
        probs_TE, taken_TE = probs_BSE.flatten(0, 1), taken_BSE.flatten(0, 1)
        tokens_N, experts_N = taken_TE.nonzero(as_tuple=True)
        return RouterOutput(
            choices=Choices(tokens_N, experts_N, probs_TE[tokens_N, experts_N], probs_TE.shape[0]),
            logits_TE=logits_BSE.flatten(0, 1),
            probs_TE=probs_TE,
            counts_E=taken_TE.sum(0),
            losses={},
            diagnostics={},
        )

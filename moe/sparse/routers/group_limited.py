"""Experts in groups, as on nodes: a token chooses among the experts of its best groups alone.

Shapes: T tokens, E experts, G groups, K choices per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.config import GroupLimitedRouterConfig
from moe.sparse.routers.token_choice import TokenChoiceRouter


class GroupLimitedRouter(TokenChoiceRouter):
    """DeepSeek-V3's choice (arXiv 2412.19437, §2.1.2): a group scores the sum of its two best experts' scores."""

    config: GroupLimitedRouterConfig

    def choose(self, scores_TE: Tensor, top_k: int) -> Tensor:
        groups_TGE = scores_TE.unflatten(1, (self.config.n_group, -1))
        best_TG = groups_TGE.topk(2, dim=-1).values.sum(-1).topk(self.config.topk_group, dim=-1).indices
        open_TG = torch.zeros(groups_TGE.shape[:2], dtype=torch.bool, device=scores_TE.device).scatter(1, best_TG, True)
        return super().choose(groups_TGE.masked_fill(~open_TG.unsqueeze(-1), -torch.inf).flatten(1), top_k)

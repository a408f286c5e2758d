"""Expert choice: each expert takes the tokens of a sequence that score highest for it.

Every expert has the same load by construction, and a token has any number of experts, also none.

NOTE: whether a token is taken depends on the whole sequence, so in training each prediction sees a little of the
future that it predicts. `reads_prefix` reads the trained router causally, in evaluation: a token is taken if it is
among the best of the tokens up to itself. Text can't be generated from a cache, since a token's experts change with
what follows.

Shapes: B sequences, S positions, T tokens (row-major: B·S, less those that only fill up their sequence), H hidden,
E experts, N choices.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.config import ExpertChoiceRouterConfig
from moe.kernels.wide_linear import wide_linear
from moe.sparse.balance import router_entropy, z_loss
from moe.sparse.randomness import Randomness
from moe.sparse.real_tokens import RealTokens, token_mean
from moe.sparse.routers.base import Choices, Router, RouterLoss, RouterOutput
from moe.sparse.routers.capacity import expert_capacities, expert_capacity

COMPARED = 1 << 24  # pairs of positions and experts that are compared at a time


class ExpertChoiceRouter(Router):
    """An expert takes the ceil(S · c / E) tokens of highest probability of each sequence, and weighs them with it
    (arXiv 2202.09368, §3.2, there over the whole batch; per sequence it doesn't depend on the ranks)."""

    config: ExpertChoiceRouterConfig

    def __init__(self, hidden_size: int, config: ExpertChoiceRouterConfig) -> None:
        super().__init__(hidden_size, config)
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    @property
    def keeps_balance(self) -> bool:
        return True

    def forward(
        self, x_BSH: Tensor, randomness: Randomness | None = None, real: RealTokens | None = None
    ) -> RouterOutput:
        del randomness
        dtype = torch.promote_types(x_BSH.dtype, torch.float32)
        with torch.autocast(x_BSH.device.type, enabled=False):
            logits_BSE = wide_linear(x_BSH, self.trained(self.adapted(self.weight)))
            probs_BSE = logits_BSE.softmax(-1)
            scores_BSE = probs_BSE.detach()
            in_prefix = self.reads_prefix and not self.training
            taken_BSE = self.best_so_far(scores_BSE) if in_prefix else self.best(scores_BSE, real)
            logits_TE, probs_TE, taken_TE = (one.flatten(0, 1) for one in (logits_BSE, probs_BSE, taken_BSE))
            if real is not None:
                logits_TE, probs_TE, taken_TE = map(real.select, (logits_TE, probs_TE, taken_TE))
            return RouterOutput(
                choices=_choices(taken_TE, probs_TE),
                logits_TE=logits_TE,
                probs_TE=probs_TE,
                counts_E=taken_TE.sum(0),
                losses={"router_z_loss": RouterLoss(z_loss(logits_TE), self.at("z_loss_coef"))},
                diagnostics={
                    "router_entropy": router_entropy(probs_TE.detach()),
                    "unserved_fraction": token_mean((~taken_TE.any(-1)).to(dtype)),
                },
            )

    def capacity(self, tokens: int) -> int:
        """Tokens that an expert takes of a sequence of so many."""
        return expert_capacity(tokens, self.config.capacity_factor, self.config.num_experts, 1.0)

    def best(self, scores_BSE: Tensor, real: RealTokens | None = None) -> Tensor:
        """Which tokens each expert takes, bool [B, S, E]; of equal scores the earliest. With `real` tokens as many as
        of a sequence of these alone."""
        capacity: int | Tensor = self.capacity(scores_BSE.shape[1])
        if real is not None:
            rule = 1.0, self.config.num_experts, self.config.capacity_factor
            capacity = expert_capacities(real, *rule)[:, None, None]
            real_BS1 = real.spread(torch.ones_like(real.places_T, dtype=torch.bool)).view(*scores_BSE.shape[:2], 1)
            scores_BSE = scores_BSE.masked_fill(~real_BS1, -1.0)
        order_BSE = scores_BSE.argsort(dim=1, descending=True, stable=True)
        return order_BSE.argsort(dim=1) < capacity

    def best_so_far(self, scores_BSE: Tensor) -> Tensor:
        """The same for each token as if it were the last of its sequence."""
        batch, length, experts = scores_BSE.shape
        capacity_S = torch.tensor([self.capacity(end) for end in range(1, length + 1)], device=scores_BSE.device)
        taken, block = [], max(1, COMPARED // max(1, batch * length * experts))
        for start in range(0, length, block):
            mine_BQE = scores_BSE[:, start : start + block]
            at_Q = torch.arange(start, start + mine_BQE.shape[1], device=scores_BSE.device)
            before_QS = torch.arange(length, device=scores_BSE.device) < at_Q.unsqueeze(1)
            above_BQSE = scores_BSE.unsqueeze(1) >= mine_BQE.unsqueeze(2)
            better_BQE = (above_BQSE & before_QS.unsqueeze(-1)).sum(2)
            taken.append(better_BQE < capacity_S[at_Q].unsqueeze(-1))
        return torch.cat(taken, dim=1) if taken else torch.zeros_like(scores_BSE, dtype=torch.bool)


def _choices(taken_TE: Tensor, probs_TE: Tensor) -> Choices:
    """The marked pairs as rows, in token order, a token's most probable expert first."""
    tokens_N, experts_N = taken_TE.nonzero(as_tuple=True)
    order_N = probs_TE.detach()[tokens_N, experts_N].argsort(descending=True, stable=True)
    order_N = order_N[tokens_N[order_N].argsort(stable=True)]
    tokens_N, experts_N = tokens_N[order_N], experts_N[order_N]
    return Choices(tokens_N, experts_N, probs_TE[tokens_N, experts_N], taken_TE.shape[0])

"""The top-k router: each token goes to its k most probable experts.

Shapes: B sequences, S positions, T = B·S tokens (row-major), H hidden, E experts, K choices per token.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.config import DropPolicy, TopKRouterConfig
from moe.sparse.balance import load_balancing_loss, router_entropy, z_loss
from moe.sparse.randomness import Randomness
from moe.sparse.routers.base import Choices, Router, RouterLoss, RouterOutput, count_choices


class TopKRouter(Router):
    """Top-k token choice with Mixtral's weights: softmax over the k chosen logits (arXiv 2401.04088, eq. 2–3).

    Softmax over all experts renormalised over the chosen is the same number; this form also yields the probabilities
    that the balance loss needs. Arithmetic is float32 even under bf16 weights or autocast: a rounding error in a logit
    is another expert, not a small difference.
    """

    config: TopKRouterConfig

    def __init__(self, hidden_size: int, config: TopKRouterConfig) -> None:
        super().__init__(hidden_size, config)
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    @property
    def keeps_balance(self) -> bool:
        return self.config.aux_loss_coef > 0

    def forward(self, x_BSH: Tensor, randomness: Randomness | None = None) -> RouterOutput:
        """Route x [B, S, H] of any float dtype. Differentiable through logits, probs, weights and both losses.

        NOTE: `router.capacity_factor` acts in training mode only. In evaluation a token would otherwise lose experts
        to its neighbours, and cached decoding (S = 1) would differ from recomputation. So does `router.jitter_noise`,
        which needs `randomness`: ValueError without.
        """
        config = self.config
        dtype = torch.promote_types(x_BSH.dtype, torch.float32)
        with torch.autocast(x_BSH.device.type, enabled=False):
            input_BSH = x_BSH.to(dtype)
            if config.jitter_noise and self.training:
                if randomness is None:
                    raise ValueError(f"router.jitter_noise={config.jitter_noise} needs the batch's randomness")
                input_BSH = randomness.jitter(input_BSH, config.jitter_noise)
            logits_TE = F.linear(input_BSH.flatten(0, 1), self.weight.to(dtype))
            probs_TE = torch.softmax(logits_TE, dim=-1)
            top_TK, ids_TK = torch.topk(probs_TE, config.top_k, dim=-1)
            weights_TK = top_TK / top_TK.sum(-1, keepdim=True)
            counts_E = count_choices(ids_TK.flatten(), config.num_experts)
            keep_TK = None
            if config.capacity_factor is not None and self.training:
                capacity = min(expert_capacity(x_BSH.shape[1], config), x_BSH.shape[1])  # an int64, whatever the factor
                keep_TK = keep_choices(ids_TK, probs_TE.detach(), x_BSH.shape[0], capacity, config.drop_policy)
            return RouterOutput(
                choices=Choices.top_k(ids_TK, weights_TK, keep_TK),
                logits_TE=logits_TE,
                probs_TE=probs_TE,
                counts_E=counts_E,
                losses={
                    "load_balancing_loss": RouterLoss(load_balancing_loss(probs_TE, counts_E), config.aux_loss_coef),
                    "router_z_loss": RouterLoss(z_loss(logits_TE), config.z_loss_coef),
                },
                diagnostics={"router_entropy": router_entropy(probs_TE.detach())},
            )


def expert_capacity(sequence_length: int, config: TopKRouterConfig) -> int:
    """ceil(S · k / E · factor): choices one expert takes from one sequence, ≥ 1 (GShard, arXiv 2006.16668, §2.2).

    Exact decimal arithmetic: in floats 100 · 1.1 is just above 110 and would round up to 111.
    """
    if config.capacity_factor is None:
        raise ValueError("router.capacity_factor=null has no capacity: dropless routing takes every choice")
    share = Fraction(sequence_length * config.top_k, config.num_experts)
    return math.ceil(share * Fraction(str(config.capacity_factor)))


def keep_choices(ids_TK: Tensor, probs_TE: Tensor, num_sequences: int, capacity: int, policy: DropPolicy) -> Tensor:
    """Mark the choices that stay when an expert takes at most `capacity` of each sequence; bool [T, K].

    Deciding per sequence makes the result independent of the batch, the ranks and the exchange. `position` keeps the
    earliest tokens, so it is causal; `probability` keeps the most probable ones (ties: the earliest), so a token's fate
    depends on later tokens of its sequence. Weights of the choices that stay are not renormalised.
    """
    tokens, experts = probs_TE.shape
    ids_BSK = ids_TK.view(num_sequences, tokens // max(num_sequences, 1), -1)
    chosen_BSE = torch.zeros(*ids_BSK.shape[:2], experts, dtype=torch.int64, device=ids_TK.device)
    chosen_BSE.scatter_(2, ids_BSK, 1)
    if policy is DropPolicy.position:
        rank_BSE = chosen_BSE.cumsum(1)
    else:
        # A probability can underflow to 0, so what wasn't chosen sorts below it.
        score_BSE = torch.where(chosen_BSE.bool(), probs_TE.view_as(chosen_BSE), -1.0)
        order_BSE = score_BSE.argsort(dim=1, descending=True, stable=True)
        rank_BSE = order_BSE.argsort(dim=1) + 1
    return (rank_BSE <= capacity).gather(2, ids_BSK).view_as(ids_TK)

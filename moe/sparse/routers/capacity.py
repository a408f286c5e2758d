"""How many choices an expert takes, and which it turns away.

Shapes: B sequences, S positions, T = B·S tokens (row-major), E experts, K choices per token.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from moe.config import DropPolicy


def expert_capacity(sequence_length: int, per_token: float, num_experts: int, factor: float) -> int:
    """ceil(S · k / E · factor): choices one expert takes from one sequence, ≥ 1 (GShard, arXiv 2006.16668, §2.2); at
    most S, since no token chooses an expert twice.

    Exact decimal arithmetic: in floats 100 · 1.1 is just above 110 and would round up to 111.
    """
    share = sequence_length * Fraction(str(per_token)) / num_experts
    return min(math.ceil(share * Fraction(str(factor))), sequence_length)


def keep_choices(ids_TK: Tensor, scores_TE: Tensor, num_sequences: int, capacity: int, policy: DropPolicy) -> Tensor:
    """Mark the choices that stay when an expert takes at most `capacity` of each sequence; bool [T, K].

    Deciding per sequence makes the result independent of the batch, the ranks and the exchange. `position` keeps the
    earliest tokens, so it is causal; `probability` keeps those with the highest scores ≥ 0 (ties: the earliest), so a
    token's fate depends on later tokens of its sequence. Weights of the choices that stay are not renormalised.
    """
    tokens, experts = scores_TE.shape
    ids_BSK = ids_TK.view(num_sequences, tokens // max(num_sequences, 1), -1)
    chosen_BSE = torch.zeros(*ids_BSK.shape[:2], experts, dtype=torch.int64, device=ids_TK.device)
    chosen_BSE.scatter_(2, ids_BSK, 1)
    if policy is DropPolicy.position:
        rank_BSE = chosen_BSE.cumsum(1)
    else:
        # A score can underflow to 0, so what wasn't chosen sorts below it.
        score_BSE = torch.where(chosen_BSE.bool(), scores_TE.view_as(chosen_BSE), -1.0)
        order_BSE = score_BSE.argsort(dim=1, descending=True, stable=True)
        rank_BSE = order_BSE.argsort(dim=1) + 1
    return (rank_BSE <= capacity).gather(2, ids_BSK).view_as(ids_TK)

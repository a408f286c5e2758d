"""How many choices an expert takes, and which it turns away.

Shapes: B sequences, S positions, T tokens (row-major: B·S, less those that only fill up their sequence), E experts,
K choices per token.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from moe.config import DropPolicy
from moe.sparse.real_tokens import RealTokens


def expert_capacity(sequence_length: int, per_token: float, num_experts: int, factor: float) -> int:
    """ceil(S · k / E · factor): choices one expert takes from one sequence, ≥ 1 (GShard, arXiv 2006.16668, §2.2); at
    most S, since no token chooses an expert twice.

    Exact decimal arithmetic: in floats 100 · 1.1 is just above 110 and would round up to 111.
    """
    share = sequence_length * Fraction(str(per_token)) / num_experts
    return min(math.ceil(share * Fraction(str(factor))), sequence_length)


def expert_capacities(real: RealTokens, per_token: float, num_experts: int, factor: float) -> Tensor:
    """int64 [B]: the `expert_capacity` of each sequence's real tokens."""
    return _capacities(real.length, per_token, num_experts, factor, real.places_T.device)[real.lengths_B]


@lru_cache
def _capacities(longest: int, per_token: float, num_experts: int, factor: float, device: torch.device) -> Tensor:
    """By length, from 0."""
    by_length = [expert_capacity(length, per_token, num_experts, factor) for length in range(longest + 1)]
    return torch.tensor(by_length, device=device)


def keep_choices(
    ids_TK: Tensor,
    scores_TE: Tensor,
    num_sequences: int,
    capacity: int | Tensor,
    policy: DropPolicy,
    real: RealTokens | None = None,
) -> Tensor:
    """Mark the choices that stay when an expert takes at most `capacity` (with `real` tokens: [B]) of each sequence;
    bool [T, K].

    Deciding per sequence makes the result independent of the batch, the ranks and the exchange. `position` keeps the
    earliest tokens, so it is causal; `probability` keeps those with the highest scores ≥ 0 (ties: the earliest), so a
    token's fate depends on later tokens of its sequence. Weights of the choices that stay are not renormalised.
    """
    chosen_TE = torch.zeros(scores_TE.shape, dtype=torch.int64, device=ids_TK.device).scatter_(1, ids_TK, 1)
    if real is not None:
        assert isinstance(capacity, Tensor), "sequences of different lengths have a capacity each"
        chosen_TE, scores_TE, capacity = real.spread(chosen_TE), real.spread(scores_TE), capacity[:, None, None]
    places, experts = scores_TE.shape
    chosen_BSE = chosen_TE.view(num_sequences, places // max(num_sequences, 1), experts)
    if policy is DropPolicy.position:
        rank_BSE = chosen_BSE.cumsum(1)
    else:
        # A score can underflow to 0, so what wasn't chosen sorts below it.
        score_BSE = torch.where(chosen_BSE.bool(), scores_TE.view_as(chosen_BSE), -1.0)
        order_BSE = score_BSE.argsort(dim=1, descending=True, stable=True)
        rank_BSE = order_BSE.argsort(dim=1) + 1
    kept_TE = (rank_BSE <= capacity).view_as(chosen_TE)
    return (kept_TE if real is None else real.select(kept_TE)).gather(1, ids_TK)

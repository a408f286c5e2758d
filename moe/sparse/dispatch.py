"""Dispatch: bring each token to its experts and the results back, on one rank or on several.

Shapes: T tokens, K choices per token, N = kept choices (T·K when dropless), H hidden, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Order:
    """Choices sorted by expert, stably: inside an expert rows keep token order, so results don't depend on chance."""

    tokens_N: Tensor  # int64, the token of each sorted row
    rows_TK: Tensor  # int64, the sorted row of each choice (any row where dropped)
    counts_E: Tensor  # int64, kept choices per expert
    keep_TK: Tensor | None


def sort_by_expert(ids_TK: Tensor, keep_TK: Tensor | None, num_experts: int) -> Order:
    """Sort choices by expert id; dropped ones sort last and are cut off."""
    ids_N = ids_TK.flatten() if keep_TK is None else torch.where(keep_TK, ids_TK, num_experts).flatten()
    order_N = ids_N.argsort(stable=True)
    rows_N = torch.empty_like(order_N)
    rows_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_N.device)
    counts_E = counts.scatter_add_(0, ids_N, torch.ones_like(ids_N))[:num_experts]
    if keep_TK is not None:
        kept = int(counts_E.sum())
        order_N, rows_N = order_N[:kept], rows_N.clamp(max=max(kept - 1, 0))
    return Order(order_N // ids_TK.shape[1], rows_N.view_as(ids_TK), counts_E, keep_TK)


def gather_rows(x_TH: Tensor, order: Order) -> Tensor:
    """Copy each token's row to its place in expert order; [N, H]."""
    return x_TH[order.tokens_N]


def combine_rows(y_NH: Tensor, weights_TK: Tensor, order: Order) -> Tensor:
    """Weighted sum of each token's expert outputs, a dropped one being zero; [T, H] in y's dtype."""
    weights_TK = weights_TK if order.keep_TK is None else weights_TK * order.keep_TK
    return (y_NH[order.rows_TK] * weights_TK.unsqueeze(-1)).sum(1).to(y_NH.dtype)

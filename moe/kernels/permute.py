"""Copies token rows into expert order and back, by gathers in the forward and the backward pass.

Nothing is added atomically, so results are deterministic. Runs on every device; `gather_rows_reference` and
`combine_rows_reference` are the same in plain PyTorch. Triton's sums of rows are in `moe.kernels.fused.rows`.

Shapes: T tokens, K places for a token's choices (the largest number of choices of any token), N rows (choices),
H hidden, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe.kernels.policy import runs_fused, wide_dtype


@dataclass(slots=True)
class RowOrder:
    """Where rows sorted by expert come from. The sort is stable: an expert's rows are in token order."""

    tokens_N: Tensor  # int64, the token of each row
    places_N: Tensor  # int64, token · K + place of each row
    rows_TK: Tensor  # int64, the row at each place; any valid row where the place has no choice
    counts_E: Tensor  # int64, rows per expert
    filled_TK: Tensor | None  # bool, whether the place has a choice; None when all have


class Combination(NamedTuple):
    """What is done with the rows before and after the experts: tokens' rows are copied in this order, and with weights
    each token gets the sum of its rows. A weight where there is no choice must be 0; its gradient has no meaning."""

    weights_TK: Tensor | None
    order: RowOrder


def gather_rows(x_TH: Tensor, order: RowOrder) -> Tensor:
    """Copy each token's row to its rows in expert order; [N, H]."""
    return _GatherRows.apply(x_TH, order)  # type: ignore[no-any-return]


def combine_rows(y_NH: Tensor, weights_TK: Tensor, order: RowOrder) -> Tensor:
    """Each token's weighted sum of its rows, [T, H] in y's dtype, summed in the weights' dtype.

    The weight of a place without a choice must be 0; its gradient has no meaning.
    """
    return _CombineRows.apply(y_NH, weights_TK, order)  # type: ignore[no-any-return]


def gather_rows_reference(x_TH: Tensor, order: RowOrder) -> Tensor:
    return x_TH[order.tokens_N]


def combine_rows_reference(y_NH: Tensor, weights_TK: Tensor, order: RowOrder) -> Tensor:
    weights_N1 = weights_TK.flatten()[order.places_N].unsqueeze(1)
    out_TH = weights_TK.new_zeros(weights_TK.shape[0], y_NH.shape[1])
    return out_TH.index_add(0, order.tokens_N, y_NH * weights_N1).to(y_NH.dtype)


def inverse(permutation: Tensor) -> Tensor:
    """The permutation that undoes `permutation`, int64 [N]."""
    result = torch.empty_like(permutation)
    result[permutation] = torch.arange(permutation.numel(), device=permutation.device)
    return result


def permute_rows(rows: Tensor, permutation: Tensor, its_inverse: Tensor) -> Tensor:
    """rows[permutation]; the backward pass gathers by the inverse (index_select's own one adds atomically)."""
    return _Permute.apply(rows, permutation, its_inverse)  # type: ignore[no-any-return]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, order: RowOrder) -> Tensor:
        ctx.order = order
        return x_TH.index_select(0, order.tokens_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_NH: Tensor) -> tuple[Tensor, None]:
        return sum_rows(dx_NH, ctx.order, None), None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_NH: Tensor, weights_TK: Tensor, order: RowOrder) -> Tensor:
        ctx.save_for_backward(y_NH, weights_TK)
        ctx.order = order
        return sum_rows(y_NH, order, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor, Tensor, None]:
        y_NH, weights_TK = ctx.saved_tensors
        return *combine_backward(dy_TH, y_NH, weights_TK, ctx.order), None


def sum_rows(rows_NH: Tensor, order: RowOrder, weights_TK: Tensor | None) -> Tensor:
    """Σₖ weights[t, k] · rows[index[t, k]] over a token's choices, [T, H]; weights of None are 1.

    A weight where there is no choice must be 0.
    """
    if runs_fused(rows_NH):
        from moe.kernels.fused import rows

        return rows.sum_rows(rows_NH, order.rows_TK, weights_TK, order.filled_TK)
    if weights_TK is None and order.filled_TK is not None:
        weights_TK = order.filled_TK.to(wide_dtype(rows_NH.dtype))
    return _sum_rows(rows_NH, order.rows_TK, weights_TK)


def combine_backward(dy_TH: Tensor, y_NH: Tensor, weights_TK: Tensor, order: RowOrder) -> tuple[Tensor, Tensor]:
    """The gradients of the rows [N, H] and of the weights [T, K] from that of their weighted sum."""
    if runs_fused(y_NH):
        from moe.kernels.fused import rows

        return rows.combine_backward(dy_TH, y_NH, weights_TK, order.rows_TK, order.filled_TK)
    dy_NH = dy_TH.index_select(0, order.tokens_N).to(weights_TK.dtype)
    dweights_TK = (dy_NH * y_NH).sum(1)[order.rows_TK]
    weights_N1 = weights_TK.flatten()[order.places_N].unsqueeze(1)
    return dy_NH.mul_(weights_N1).to(y_NH.dtype), dweights_TK


def _sum_rows(rows_NH: Tensor, index_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """An embedding bag needs one pass and no [T, K, H] copy."""
    if index_TK.numel() == 0:  # no tokens, or no choice at all
        return rows_NH.new_zeros(index_TK.shape[0], rows_NH.shape[1])
    if rows_NH.dtype in (torch.float32, torch.float64):
        return F.embedding_bag(index_TK, rows_NH, mode="sum", per_sample_weights=weights_TK)
    # Narrower dtypes: multiply and add in float32, round once at the end.
    if rows_NH.device.type == "cpu":  # one choice after the other, which takes half the time of a [T, K, H] copy
        return _sum_choices(rows_NH, index_TK, weights_TK)
    rows_TKH = rows_NH[index_TK].float()
    return (rows_TKH if weights_TK is None else rows_TKH * weights_TK.unsqueeze(-1)).sum(1).to(rows_NH.dtype)


def _sum_choices(rows_NH: Tensor, index_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    total_TH = None
    for choice, index_T in enumerate(index_TK.unbind(1)):
        rows_TH = rows_NH.index_select(0, index_T).float()
        if weights_TK is not None:
            rows_TH *= weights_TK[:, choice, None]
        total_TH = rows_TH if total_TH is None else total_TH.add_(rows_TH)
    assert total_TH is not None
    return total_TH.to(rows_NH.dtype)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, permutation: Tensor, its_inverse: Tensor) -> Tensor:
        ctx.save_for_backward(its_inverse)
        return rows.index_select(0, permutation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (its_inverse,) = ctx.saved_tensors
        return grad.index_select(0, its_inverse), None, None

"""Dispatch: bring each token to its experts and the results back, on one rank or on several.

One rank: choices are sorted by expert (stably), token rows are copied into that order, and after the experts each
token sums its rows by weight. With expert parallelism two exchanges surround the experts:

1. every rank tells every other how many rows each of its experts will get (one small all-to-all, read on the host);
2. the rows themselves (one all-to-all with exact counts: nothing is padded or dropped);
3. received rows lie rank after rank; a second stable sort puts them expert after expert, so that inside an expert
   they are in the order (source rank, token), the order of the whole batch;
4. after the experts the same way back. The backward pass mirrors it: gradients travel by the opposite exchange.

Every rank takes part in every exchange, also with no row to send or receive, or the others would wait for ever. Both
directions of every copy are gathers by a permutation or its inverse: no atomic additions, so results are deterministic.

Shapes: T tokens, K choices per token, N = kept choices (T·K when dropless), M rows received, H hidden, E experts,
R ranks of the expert group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@dataclass(slots=True)
class Order:
    """Choices sorted by expert, stably: inside an expert, rows keep token order."""

    choices_N: Tensor  # int64, the flat choice (token · K + slot) of each sorted row
    tokens_N: Tensor  # int64, its token
    rows_TK: Tensor  # int64, the sorted row of each choice (some valid row where dropped)
    counts_E: Tensor  # int64, kept choices per expert
    keep_TK: Tensor | None  # bool; None when all are kept


def sort_by_expert(ids_TK: Tensor, keep_TK: Tensor | None, counts_E: Tensor) -> Order:
    """Sort choices by expert id; dropped ones sort last and are cut off. `counts_E` counts choices before dropping."""
    experts = counts_E.numel()
    ids_N = ids_TK.flatten() if keep_TK is None else torch.where(keep_TK, ids_TK, experts).flatten()
    choices_N = ids_N.argsort(stable=True)
    rows_N = _inverse(choices_N)
    if keep_TK is not None:
        counts_E = torch.zeros_like(counts_E).scatter_add_(0, ids_TK.flatten(), keep_TK.flatten().to(counts_E.dtype))
        kept = int(counts_E.sum())
        choices_N, rows_N = choices_N[:kept], rows_N.clamp(max=max(kept - 1, 0))
    return Order(choices_N, choices_N // ids_TK.shape[1], rows_N.view_as(ids_TK), counts_E, keep_TK)


def gather_rows(x_TH: Tensor, order: Order) -> Tensor:
    """Copy each token's row to its places in expert order; [N, H]."""
    return _GatherRows.apply(x_TH, order)  # type: ignore[no-any-return]


def combine_rows(y_NH: Tensor, weights_TK: Tensor, order: Order) -> Tensor:
    """Each token's weighted sum of its expert outputs, [T, H] in y's dtype, summed in the weights' dtype.

    A dropped choice adds zero and gets a zero gradient; the weights of the others are not renormalised.
    """
    if order.keep_TK is not None:
        weights_TK = weights_TK * order.keep_TK
    return _CombineRows.apply(y_NH, weights_TK, order)  # type: ignore[no-any-return]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return x_TH.index_select(0, order.tokens_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_NH: Tensor) -> tuple[Tensor, None]:
        order: Order = ctx.order
        work = torch.promote_types(dx_NH.dtype, torch.float32)
        keep_TK = None if order.keep_TK is None else order.keep_TK.to(work)
        return _sum_rows(dx_NH, order.rows_TK, keep_TK), None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_NH: Tensor, weights_TK: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(y_NH, weights_TK)
        ctx.order = order
        return _sum_rows(y_NH, order.rows_TK, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor, Tensor, None]:
        y_NH, weights_TK = ctx.saved_tensors
        order: Order = ctx.order
        dy_NH = dy_TH.index_select(0, order.tokens_N).to(weights_TK.dtype)
        # A dropped choice's row is another's, but its weight was multiplied by keep, which zeroes this gradient.
        dweights_TK = (dy_NH * y_NH).sum(1)[order.rows_TK]
        weights_N1 = weights_TK.flatten()[order.choices_N].unsqueeze(1)
        return dy_NH.mul_(weights_N1).to(y_NH.dtype), dweights_TK, None


def _sum_rows(rows_NH: Tensor, index_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """Σₖ weights[t, k] · rows[index[t, k]], [T, H]; an embedding bag does it in one pass without the [T, K, H] copy."""
    if index_TK.numel() == 0:
        return rows_NH.new_zeros(index_TK.shape[0], rows_NH.shape[1])
    if rows_NH.dtype in (torch.float32, torch.float64):
        return F.embedding_bag(index_TK, rows_NH, mode="sum", per_sample_weights=weights_TK)
    # Narrower dtypes: float32 weights and sums, one rounding at the end.
    rows_TKH = rows_NH[index_TK].float()
    return (rows_TKH if weights_TK is None else rows_TKH * weights_TK.unsqueeze(-1)).sum(1).to(rows_NH.dtype)


@dataclass(slots=True)
class Exchange:
    """Who sends how many rows to whom, known on the host, and the order of the received rows by expert."""

    group: dist.ProcessGroup
    sent_R: list[int]  # rows to each rank
    received_R: list[int]  # rows from each rank
    counts_E: Tensor  # int64, rows per local expert, from all ranks
    by_expert_M: Tensor  # int64, the received row of each row in expert order
    by_rank_M: Tensor  # int64, its inverse


@dataclass(slots=True)
class Counts:
    """How many rows each rank sends to each expert of each rank, on its way."""

    group: dist.ProcessGroup
    sent_RE: Tensor
    received_RE: Tensor
    work: dist.Work


def send_counts(counts_E: Tensor, group: dist.ProcessGroup) -> Counts:
    """Start the exchange of the counts of all E experts' rows; the group's rank r holds experts [r·E/R, (r+1)·E/R)."""
    sent_RE = counts_E.view(dist.get_world_size(group), -1).contiguous()
    received_RE = torch.empty_like(sent_RE)
    work = dist.all_to_all_single(received_RE, sent_RE, group=group, async_op=True)
    assert work is not None
    return Counts(group, sent_RE, received_RE, work)


def plan_exchange(counts: Counts) -> Exchange:
    """Wait for the counts and work out who gets which rows."""
    counts.work.wait()
    sent_RE, received_RE = counts.sent_RE, counts.received_RE
    ranks, experts = sent_RE.shape
    sent_R, received_R = torch.stack((sent_RE.sum(1), received_RE.sum(1))).tolist()
    local_E = torch.arange(experts, device=sent_RE.device)
    ids_M = local_E.repeat(ranks).repeat_interleave(received_RE.flatten(), output_size=sum(received_R))
    by_expert_M = ids_M.argsort(stable=True)
    return Exchange(counts.group, sent_R, received_R, received_RE.sum(0), by_expert_M, _inverse(by_expert_M))


def to_experts(x_NH: Tensor, exchange: Exchange) -> Tensor:
    """Send rows in order of all experts to the ranks that hold them; returns the received [M, H] in expert order."""
    arrived_MH = _AllToAll.apply(x_NH, exchange.received_R, exchange.sent_R, exchange.group)
    return _Permute.apply(arrived_MH, exchange.by_expert_M, exchange.by_rank_M)  # type: ignore[no-any-return]


def from_experts(y_MH: Tensor, exchange: Exchange) -> Tensor:
    """The way back: results [M, H] in expert order return to the ranks and rows they came from; [N, H]."""
    y_MH = _Permute.apply(y_MH, exchange.by_rank_M, exchange.by_expert_M)
    return _AllToAll.apply(y_MH, exchange.sent_R, exchange.received_R, exchange.group)  # type: ignore[no-any-return]


class _AllToAll(torch.autograd.Function):
    """Rows to and from every rank of the group in rank order; the gradient takes the opposite way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, into_R: list[int], out_of_R: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.into_R, ctx.out_of_R, ctx.group = into_R, out_of_R, group
        return _all_to_all(rows, into_R, out_of_R, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.out_of_R, ctx.into_R, ctx.group), None, None, None


def _all_to_all(rows: Tensor, into_R: list[int], out_of_R: list[int], group: dist.ProcessGroup) -> Tensor:
    received = rows.new_empty(sum(into_R), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), into_R, out_of_R, group=group)
    return received


class _Permute(torch.autograd.Function):
    """Rows by a permutation, whose inverse brings the gradient back (index_select's own backward adds atomically)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, permutation: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, permutation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def _inverse(permutation: Tensor) -> Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.numel(), device=permutation.device)
    return inverse

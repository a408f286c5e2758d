"""Dispatch: send each token to its experts and return the results, on one rank or on several.

One rank: choices are sorted by expert (stably), token rows are copied into that order, and after the experts each
token sums its rows by weight. With expert parallelism two exchanges surround the experts:

1. every rank tells every other how many rows each of its experts will get (one small all-to-all, read on the host);
2. the rows themselves are exchanged (one all-to-all with exact counts: nothing is padded or dropped);
3. received rows are ordered by source rank; a second stable sort orders them by expert, so that within an expert they
   are in the order (source rank, token), the order of the whole batch;
4. after the experts, the inverse sort and exchange return the results. The backward pass runs the same exchanges in the
   opposite direction.

An exchange of rows is started by one call and waited for by another, and what is computed in between overlaps with it.
A layer may exchange its tokens in several chunks, each by these steps.

Every rank takes part in every exchange, even with no rows to send or receive; otherwise the other ranks would hang.
Rows are copied, forward and backward, by gathers with a permutation or its inverse: without atomic additions the
results are deterministic.

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

from moe.kernels.permute import RowOrder, inverse, permute_rows
from moe.sparse.routers.base import Choices, count_choices


def sort_by_expert(choices: Choices, counts_E: Tensor) -> tuple[RowOrder, Tensor]:
    """The order of rows by expert, and the weight of each token's k-th choice [T, K], 0 where it has fewer than K.

    `counts_E` are the router's counts. If tokens may differ in their number of choices, as when capacity drops some,
    each expert's rows are counted again, since the router's counts include dropped choices.
    """
    sorted_N = choices.experts_N.argsort(stable=True)
    rows_N = inverse(sorted_N)
    tokens_N = choices.tokens_N.index_select(0, sorted_N)
    if choices.per_token is not None:
        shape = choices.num_tokens, choices.per_token
        return RowOrder(tokens_N, sorted_N, rows_N.view(shape), counts_E, None), choices.weights_N.view(shape)
    starts_T = torch.searchsorted(choices.tokens_N, torch.arange(choices.num_tokens + 1, device=tokens_N.device))
    per_token = int(starts_T.diff().max()) if choices.num_tokens else 0
    place_N = torch.arange(len(sorted_N), device=tokens_N.device) - starts_T[choices.tokens_N]
    at = choices.tokens_N, place_N
    rows_TK = tokens_N.new_zeros(choices.num_tokens, per_token).index_put(at, rows_N)
    weights_TK = choices.weights_N.new_zeros(rows_TK.shape).index_put(at, choices.weights_N)
    filled_TK = torch.zeros_like(rows_TK, dtype=torch.bool).index_put(at, torch.ones_like(rows_N, dtype=torch.bool))
    places_N = (choices.tokens_N * per_token + place_N).index_select(0, sorted_N)
    counts_E = count_choices(choices.experts_N, len(counts_E))
    return RowOrder(tokens_N, places_N, rows_TK, counts_E, filled_TK), weights_TK


@dataclass(slots=True)
class Exchange:
    """How many rows to send to and receive from each rank, and the permutation of received rows into expert order."""

    group: dist.ProcessGroup
    sent_R: list[int]  # rows to each rank
    received_R: list[int]  # rows from each rank
    counts_E: Tensor  # int64, rows per local expert, from all ranks
    by_expert_M: Tensor  # int64, the received row of each row in expert order
    by_rank_M: Tensor  # int64, its inverse


@dataclass(slots=True)
class Counts:
    """An exchange of counts in flight: how many rows each rank sends to each expert of each rank."""

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
    """Wait for the counts; compute how many rows go to each rank and the order of those received."""
    counts.work.wait()
    sent_RE, received_RE = counts.sent_RE, counts.received_RE
    ranks, experts = sent_RE.shape
    sent_R, received_R = torch.stack((sent_RE.sum(1), received_RE.sum(1))).tolist()
    local_E = torch.arange(experts, device=sent_RE.device)
    ids_M = local_E.repeat(ranks).repeat_interleave(received_RE.flatten(), output_size=sum(received_R))
    by_expert_M = ids_M.argsort(stable=True)
    return Exchange(counts.group, sent_R, received_R, received_RE.sum(0), by_expert_M, inverse(by_expert_M))


@dataclass(slots=True)
class Travelling:
    """Rows on their way to other ranks, from `to_experts` or `from_experts` on. What is computed before `arrived` is
    called overlaps with their exchange, and its backward pass with that of their gradients."""

    link: Tensor  # in the graph of the backward pass, between the start and the end
    transfer: _Transfer

    def arrived(self) -> Tensor:
        """Waits; the rows received, in rank order. Call it once."""
        return _AllToAllEnd.apply(self.link, self.transfer)  # type: ignore[no-any-return]


def to_experts(x_NH: Tensor, exchange: Exchange) -> Travelling:
    """Starts to send rows [N, H], sorted by global expert, to the experts' ranks."""
    transfer = _Transfer(exchange.received_R, exchange.sent_R, exchange.group)
    return Travelling(_AllToAllStart.apply(x_NH, transfer), transfer)


def from_experts(y_MH: Tensor, exchange: Exchange) -> Travelling:
    """Starts to return results [M, H], in the order of `by_expert`, to the ranks of their rows; they arrive [N, H] in
    the order in which the rows were sent."""
    transfer = _Transfer(exchange.sent_R, exchange.received_R, exchange.group)
    rows = permute_rows(y_MH, exchange.by_rank_M, exchange.by_expert_M)
    return Travelling(_AllToAllStart.apply(rows, transfer), transfer)


def by_expert(arrived_MH: Tensor, exchange: Exchange) -> Tensor:
    """The rows that `to_experts` sent, in expert order."""
    return permute_rows(arrived_MH, exchange.by_expert_M, exchange.by_rank_M)


@dataclass(slots=True)
class _Transfer:
    """An exchange of rows, in rank order, with every rank of the group, and that of their gradients back.

    `_AllToAllStart` starts it and `_AllToAllEnd` waits for it. In the backward pass the end starts the exchange of
    gradients, and the start waits for it; between the two the gradient is a buffer that is still being filled, which
    nothing else may read. Autograd runs, of the nodes that are ready, the one that was made last: what was computed
    between start and end is therefore differentiated between them too. The overlap depends on that order, the results
    don't.
    """

    into_R: list[int]
    out_of_R: list[int]
    group: dist.ProcessGroup
    in_flight: tuple[dist.Work, Tensor, Tensor] | None = None  # what is sent must live as long as what arrives

    def start(self, rows: Tensor, into_R: list[int], out_of_R: list[int]) -> Tensor:
        """The tensor that the rows arrive in."""
        received, sent = rows.new_empty(sum(into_R), *rows.shape[1:]), rows.contiguous()
        work = dist.all_to_all_single(received, sent, into_R, out_of_R, group=self.group, async_op=True)
        assert work is not None
        self.in_flight = work, sent, received
        return received

    def wait(self) -> Tensor:
        assert self.in_flight is not None
        work, _, received = self.in_flight
        work.wait()
        self.in_flight = None
        return received


class _AllToAllStart(torch.autograd.Function):
    """Returns a placeholder of the rows' shape that only links this node to `_AllToAllEnd`; its gradient is the buffer
    in which the rows' gradients arrive."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.start(rows, transfer.into_R, transfer.out_of_R)
        return rows.new_empty(1).expand(rows.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.wait(), None


class _AllToAllEnd(torch.autograd.Function):
    """Takes what `_AllToAllStart` returned; returns the rows that arrived."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        transfer = ctx.transfer
        return transfer.start(grad, transfer.out_of_R, transfer.into_R), None

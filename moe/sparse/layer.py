"""The sparse layer: router → dispatch → experts → combine, in place of a block's dense MLP.

Shapes: B sequences, S positions, P = B·S places, T tokens (all places, less those that only fill up their sequence),
C tokens of a chunk, N rows to compute (choices), M rows received from the expert group, H hidden, E experts,
K choices per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.config import ExpertBackend, ExpertsConfig, RouterConfig
from moe.errors import UserError
from moe.kernels import megablocks, permute
from moe.sparse.dispatch import (
    Exchange,
    Travelling,
    by_expert,
    from_experts,
    plan_exchange,
    send_counts,
    sort_by_expert,
    to_experts,
)
from moe.sparse.experts import Experts
from moe.sparse.randomness import Randomness
from moe.sparse.real_tokens import RealTokens
from moe.sparse.routers import Router, RouterOutput, build_router
from moe.sparse.routers.base import count_choices


class SparseMLP(nn.Module):
    """Mixtral's sparse feed-forward (arXiv 2401.04088, §2.1). With an expert group of R ranks, rank r holds experts
    [r·E/R, (r+1)·E/R)."""

    def __init__(
        self,
        gate: Router,
        experts: Experts,
        *,
        shared_experts: nn.Module | None = None,
        expert_group: dist.ProcessGroup | None = None,
        exchange_chunks: int = 1,
        megablocks: bool = False,
    ) -> None:
        """`experts` holds this rank's share; every token also uses `shared_experts`.

        With an expert group the tokens' rows are exchanged in `exchange_chunks` parts, one after the other.

        With `megablocks=True`, MegaBlocks' kernels gather and combine rows whenever every token has the same number of
        choices.
        """
        super().__init__()
        self.gate, self.experts, self.expert_group = gate, experts, expert_group
        self.shared_experts, self.exchange_chunks = shared_experts, exchange_chunks
        self.moves_by_megablocks = megablocks

    def forward(
        self, x_BSH: Tensor, randomness: Randomness | None = None, real: RealTokens | None = None
    ) -> tuple[Tensor, RouterOutput]:
        """x [B, S, H] → (y [B, S, H], the router's output). Every rank of the expert group must call it together.

        Where only some tokens are `real`, no expert computes the others: they get zeros, as if all choices were
        dropped.
        """
        if self.expert_group is not None:
            dispatched = self.dispatch(x_BSH, randomness, real)
            self.compute(dispatched)
            return self.combine(dispatched), dispatched.routed
        routed = self.route(x_BSH, randomness, real)
        y_TH = self._on_this_rank(_tokens(x_BSH, real), routed)
        return _placed(y_TH, real, x_BSH.shape, self._shared(x_BSH)), routed

    def route(self, x_BSH: Tensor, randomness: Randomness | None, real: RealTokens | None) -> RouterOutput:
        return self.gate(x_BSH, randomness) if real is None else self.gate(x_BSH, randomness, real=real)

    def dispatch(self, x_BSH: Tensor, randomness: Randomness | None, real: RealTokens | None) -> Dispatched:
        """`forward`'s first part with an expert group: routes, and starts to send the rows to their experts' ranks.
        Shared experts are computed while they travel."""
        assert self.expert_group is not None
        routed = self.route(x_BSH, randomness, real)
        chunks = self._send(_tokens(x_BSH, real), routed, self.expert_group)
        return Dispatched(x_BSH.shape, real, routed, chunks, self._shared(x_BSH))

    def compute(self, dispatched: Dispatched) -> None:
        """The second part: computes the rows that arrived for this rank's experts, and starts to return the results.
        While it computes a chunk, the next ones' rows and the results before them travel."""
        for chunk in dispatched.chunks:
            x_MH = by_expert(chunk.rows.arrived(), chunk.exchange)
            results = from_experts(self.experts(x_MH, chunk.exchange.counts_E), chunk.exchange)
            dispatched.results.append(results)

    def combine(self, dispatched: Dispatched) -> Tensor:
        """The third part: waits for the results; each token's sum by weight, y [B, S, H]."""
        chunks = [
            self._moves(chunk.order).combine_rows(y.arrived(), chunk.weights_CK, chunk.order)
            for chunk, y in zip(dispatched.chunks, dispatched.results, strict=True)
        ]
        dispatched.chunks, dispatched.results = [], []  # so that their rows need no memory any more
        y_TH = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
        return _placed(y_TH, dispatched.real, dispatched.shape, dispatched.shared_BSH)

    def _shared(self, x_BSH: Tensor) -> Tensor | None:
        return None if self.shared_experts is None else self.shared_experts(x_BSH)

    def _on_this_rank(self, x_TH: Tensor, routed: RouterOutput) -> Tensor:
        order, weights_TK = sort_by_expert(routed.choices, routed.counts_E)
        moves = self._moves(order)
        takes_tokens = isinstance(self.experts, Experts) and self.experts.takes_tokens  # not if it was replaced
        if moves is permute and takes_tokens and torch.is_grad_enabled():
            sums = self.experts.sums
            y = self.experts(x_TH, order.counts_E, permute.Combination(weights_TK if sums else None, order))
            return y if sums else permute.combine_rows(y, weights_TK, order)
        y_NH = self.experts(moves.gather_rows(x_TH, order), order.counts_E)
        return moves.combine_rows(y_NH, weights_TK, order)

    def _send(self, x_TH: Tensor, routed: RouterOutput, group: dist.ProcessGroup) -> list[_Chunk]:
        """Starts the exchanges of all chunks of tokens. Those of counts overlap with gathering the rows."""
        chunks = routed.choices.chunks(self.exchange_chunks)
        begun = []
        for choices, x_CH in zip(chunks, x_TH.split([choices.num_tokens for choices in chunks]), strict=True):
            counts_E = routed.counts_E
            if len(chunks) > 1 and choices.per_token is not None:  # `sort_by_expert` counts the others
                counts_E = count_choices(choices.experts_N, len(counts_E))
            order, weights_CK = sort_by_expert(choices, counts_E)
            counts = send_counts(order.counts_E, group)
            begun.append((order, weights_CK, counts, self._moves(order).gather_rows(x_CH, order)))
        sent = []
        for order, weights_CK, counts, x_NH in begun:
            exchange = plan_exchange(counts)
            sent.append(_Chunk(order, weights_CK, exchange, to_experts(x_NH, exchange)))
        return sent

    def _moves(self, order: permute.RowOrder) -> ModuleType:
        by_megablocks = self.moves_by_megablocks and order.filled_TK is None and len(order.tokens_N) > 0
        return megablocks if by_megablocks else permute


@dataclass(slots=True)
class _Chunk:
    """Tokens whose rows travel to their experts' ranks."""

    order: permute.RowOrder
    weights_CK: Tensor
    exchange: Exchange
    rows: Travelling


@dataclass(slots=True)
class Dispatched:
    """Tokens between `SparseMLP.dispatch` and `combine`."""

    shape: torch.Size  # of the layer's input, [B, S, H]
    real: RealTokens | None
    routed: RouterOutput
    chunks: list[_Chunk]
    shared_BSH: Tensor | None
    results: list[Travelling] = field(default_factory=list)


def _tokens(x_BSH: Tensor, real: RealTokens | None) -> Tensor:
    return x_BSH.flatten(0, 1) if real is None else real.select(x_BSH.flatten(0, 1))


def _placed(y_TH: Tensor, real: RealTokens | None, shape: torch.Size, shared_BSH: Tensor | None) -> Tensor:
    """The tokens' results in the input's shape, and those of shared experts added."""
    y_BSH = (y_TH if real is None else real.spread(y_TH)).view(shape)
    return y_BSH if shared_BSH is None else y_BSH + shared_BSH


def build_sparse_mlp(
    hidden_size: int,
    intermediate_size: int,
    router: RouterConfig,
    experts: ExpertsConfig,
    *,
    shared_experts: nn.Module | None = None,
    expert_group: dist.ProcessGroup | None = None,
) -> SparseMLP:
    """The layer with the configured router and this rank's experts. Raises UserError if the ranks don't divide E."""
    ranks = 1 if expert_group is None else dist.get_world_size(expert_group)
    rank = 0 if expert_group is None else dist.get_rank(expert_group)
    if router.num_experts % ranks:
        raise UserError(f"parallel.expert_parallel_size={ranks} must divide router.num_experts={router.num_experts}")
    num_local = router.num_experts // ranks
    return SparseMLP(
        build_router(hidden_size, router),
        Experts(hidden_size, intermediate_size, num_local, experts, first_expert=rank * num_local),
        shared_experts=shared_experts,
        expert_group=expert_group if ranks > 1 else None,
        exchange_chunks=experts.exchange_chunks,
        megablocks=experts.backend is ExpertBackend.megablocks,
    )

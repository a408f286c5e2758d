"""The sparse layer: router → dispatch → experts → combine, in place of a block's dense MLP.

Shapes: B sequences, S positions, P = B·S places, T tokens (all places, less those that only fill up their sequence),
N rows to compute (choices), M rows received from the expert group, H hidden, E experts.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from moe.config import ExpertBackend, ExpertsConfig, RouterConfig
from moe.errors import UserError
from moe.kernels import megablocks, permute
from moe.sparse.dispatch import from_experts, plan_exchange, send_counts, sort_by_expert, to_experts
from moe.sparse.experts import Experts
from moe.sparse.randomness import Randomness
from moe.sparse.real_tokens import RealTokens
from moe.sparse.routers import Router, RouterOutput, build_router


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
        megablocks: bool = False,
    ) -> None:
        """`experts` holds this rank's share; every token also uses `shared_experts`.

        With `megablocks=True`, MegaBlocks' kernels gather and combine rows whenever every token has the same number of
        choices.
        """
        super().__init__()
        self.gate, self.experts, self.expert_group = gate, experts, expert_group
        self.shared_experts = shared_experts
        self.moves_by_megablocks = megablocks

    def forward(
        self, x_BSH: Tensor, randomness: Randomness | None = None, real: RealTokens | None = None
    ) -> tuple[Tensor, RouterOutput]:
        """x [B, S, H] → (y [B, S, H], the router's output). Every rank of the expert group must call it together.

        Where only some tokens are `real`, no expert computes the others: they get zeros, as if all choices were
        dropped.
        """
        routed = self.gate(x_BSH, randomness) if real is None else self.gate(x_BSH, randomness, real=real)
        x_TH = x_BSH.flatten(0, 1) if real is None else real.select(x_BSH.flatten(0, 1))
        order, weights_TK = sort_by_expert(routed.choices, routed.counts_E)
        by_megablocks = self.moves_by_megablocks and order.filled_TK is None and len(order.tokens_N) > 0
        rows = megablocks if by_megablocks else permute
        # The exchange of counts overlaps with gathering the rows.
        counts = None if self.expert_group is None else send_counts(order.counts_E, self.expert_group)
        x_NH = rows.gather_rows(x_TH, order)
        arriving = None if counts is None else to_experts(x_NH, plan_exchange(counts))
        # While rows travel; in the backward pass, while their gradients do.
        shared_BSH = None if self.shared_experts is None else self.shared_experts(x_BSH)
        if arriving is None:
            source = (permute.RowSource(x_TH, order.tokens_N),) if isinstance(self.experts, Experts) else ()
            y_NH = self.experts(x_NH, order.counts_E, *source)
        else:
            exchange = arriving.exchange
            y_NH = from_experts(self.experts(arriving.rows(), exchange.counts_E), exchange)
        y_TH = rows.combine_rows(y_NH, weights_TK, order)
        y_BSH = (y_TH if real is None else real.spread(y_TH)).view_as(x_BSH)
        return y_BSH if shared_BSH is None else y_BSH + shared_BSH, routed


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
        megablocks=experts.backend is ExpertBackend.megablocks,
    )

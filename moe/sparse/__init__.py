"""What makes a Mixtral sparse: router, balance losses, dispatch, experts, and the layer that joins them."""

from moe.sparse.balance import BalanceLoss, balance_loss, max_violation, router_entropy
from moe.sparse.experts import Experts
from moe.sparse.layer import SparseMLP
from moe.sparse.randomness import Randomness
from moe.sparse.routers.base import RouterOutput
from moe.sparse.routers.topk import TopKRouter

__all__ = [
    "BalanceLoss",
    "Experts",
    "Randomness",
    "RouterOutput",
    "SparseMLP",
    "TopKRouter",
    "balance_loss",
    "max_violation",
    "router_entropy",
]

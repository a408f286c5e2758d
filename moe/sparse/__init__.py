"""What makes a Mixtral sparse: routers, balance losses, dispatch, experts, and the layer that joins them."""

from moe.sparse.balance import balance_loss, max_violation, router_entropy
from moe.sparse.experts import Experts
from moe.sparse.layer import Dispatched, SparseMLP, build_sparse_mlp
from moe.sparse.randomness import Randomness
from moe.sparse.real_tokens import RealTokens
from moe.sparse.routers import Router, RouterOutput, build_router, read_prefixes, routers_of

__all__ = [
    "Dispatched",
    "Experts",
    "Randomness",
    "RealTokens",
    "Router",
    "RouterOutput",
    "SparseMLP",
    "balance_loss",
    "build_router",
    "build_sparse_mlp",
    "max_violation",
    "read_prefixes",
    "router_entropy",
    "routers_of",
]

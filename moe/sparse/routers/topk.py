"""The top-k router: Mixtral's by default, Switch's with top_k=1, loss-free with a bias."""

from __future__ import annotations

from moe.config import TopKRouterConfig
from moe.sparse.routers.token_choice import TokenChoiceRouter


class TopKRouter(TokenChoiceRouter):
    """Token choice without noise or groups."""

    config: TopKRouterConfig

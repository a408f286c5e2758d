"""Routers, a file each. `build_router` makes the one that a configuration names."""

from __future__ import annotations

import importlib

from moe.config import RouterConfig
from moe.config.router import registered_router
from moe.sparse.routers.base import Choices, Router, RouterLoss, RouterOutput, read_prefixes, routers_of

__all__ = ["Choices", "Router", "RouterLoss", "RouterOutput", "build_router", "read_prefixes", "routers_of"]


def build_router(hidden_size: int, config: RouterConfig) -> Router:
    """The router of `config.kind` for tokens of `hidden_size` dimensions. Raises UserError for an unknown kind."""
    module, _, name = registered_router(config.kind).module.partition(":")
    return getattr(importlib.import_module(module), name)(hidden_size, config)

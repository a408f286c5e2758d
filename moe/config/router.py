"""Routers: the options that all share, the options of each, and the dataclass and module that belong to `router.kind`.

A new router is a file in moe/sparse/routers/, a dataclass here or beside it, one `register_router` and a YAML in
configs/router/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from moe.config.choices import DropPolicy
from moe.config.rules import not_negative, positive, require, share


@dataclass(kw_only=True, slots=True)
class RouterConfig:
    """What every router has. `kind` decides which options there are beside these, and which module is built."""

    kind: str = "topk"
    num_experts: int = 8

    def __post_init__(self) -> None:
        positive("router", self, "num_experts")
        require(
            registered_router(self.kind).schema is type(self),
            f"router.kind={self.kind} must be chosen by a preset (router=topk): it decides which options there are",
        )

    @property
    def experts_per_token(self) -> int:
        """Experts that compute a token, on average; what plans of FLOPs, rows and memory count with."""
        raise NotImplementedError(f"router.kind={self.kind} must say how many experts compute a token")

    def num_parameters(self, hidden_size: int) -> int:
        """Weights of one layer's router."""
        return self.num_experts * hidden_size


@dataclass(kw_only=True, slots=True)
class TopKRouterConfig(RouterConfig):
    """Top-k token choice. `capacity_factor=None` is dropless; coefficients scale losses, not metrics.

    `jitter_noise` multiplies the router's input by uniform noise in [1 − ε, 1 + ε), in training only.
    """

    top_k: int = 2
    aux_loss_coef: float = 0.02
    z_loss_coef: float = 0.001
    jitter_noise: float = 0.0
    capacity_factor: float | None = None
    drop_policy: DropPolicy = DropPolicy.position

    def __post_init__(self) -> None:
        RouterConfig.__post_init__(self)  # slots=True makes a new class, which a bare super() does not know
        positive("router", self, "top_k", "capacity_factor")
        not_negative("router", self, "aux_loss_coef", "z_loss_coef")
        share("router", self, "jitter_noise")
        require(
            self.top_k <= self.num_experts,
            f"router.top_k={self.top_k} must be ≤ router.num_experts={self.num_experts}",
        )

    @property
    def experts_per_token(self) -> int:
        return self.top_k


@dataclass(frozen=True, slots=True)
class RegisteredRouter:
    """`module` is `package.module:Class`, imported when a layer is built: configurations are read without torch."""

    schema: type[RouterConfig]
    module: str


_ROUTERS: dict[str, RegisteredRouter] = {}


def register_router(kind: str, schema: type[RouterConfig], module: str) -> None:
    """From now on `router.kind=KIND` means this dataclass and the `moe.sparse.routers.base.Router` at `module`."""
    _ROUTERS[kind] = RegisteredRouter(schema, module)


def registered_router(kind: object) -> RegisteredRouter:
    """Raises UserError for a kind that isn't registered."""
    require(
        isinstance(kind, str) and kind in _ROUTERS, f"router.kind={kind} must be one of {', '.join(sorted(_ROUTERS))}"
    )
    return _ROUTERS[str(kind)]


def saved_kind(section: object) -> object:
    """`kind` of a config.yaml's section `router`; before there were kinds, every router was top-k."""
    return section.get("kind", "topk") if isinstance(section, Mapping) else "topk"


def saved_router(section: Mapping[str, Any]) -> RouterConfig:
    """A config.yaml's section `router`, checked. Raises UserError, OmegaConfBaseException."""
    defaults = OmegaConf.structured(registered_router(saved_kind(section)).schema)
    config: Any = OmegaConf.to_object(OmegaConf.merge(defaults, section))
    return config


def router_kinds() -> list[str]:
    return sorted(_ROUTERS)


register_router("topk", TopKRouterConfig, "moe.sparse.routers.topk:TopKRouter")

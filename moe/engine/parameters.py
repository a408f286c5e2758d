"""Which of a model's parameters are trained, which decay, and which belong to experts: the same for every engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from moe.config import Config, OptimConfig, OptimizerKind
from moe.config.optim import matrix_shape
from moe.engine.base import ADAM_MOMENTS, EXPERTS, MOMENTUM, ROUTER, States
from moe.errors import UserError
from moe.sparse import routers_of
from moe.sparse.experts import Experts


def freeze(model: nn.Module, optim: OptimConfig) -> None:
    """Parameters whose names fit a pattern of `optim.freeze` don't train. Raises UserError as `left_to_train` does."""
    names = dict(model.named_parameters())
    trained = [name for name, parameter in names.items() if parameter.requires_grad]
    kept = optim.left_to_train([*names], trained)
    for name in {*trained}.difference(kept):
        names[name].requires_grad_(False)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of the trained ones, in an order that all ranks share."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def muon_shapes(model: nn.Module, config: Config) -> dict[str, tuple[int, int]]:
    """{name: rows and columns of each of its matrices} of the trained parameters that Muon updates; {} for
    `optim=adamw`. Raises UserError if Muon would update none."""
    if config.optim.kind is not OptimizerKind.muon:
        return {}
    trained = trained_parameters(model)
    found = {name: shape for name, p in trained.items() if (shape := matrix_shape(name, tuple(p.shape))) is not None}
    if not found:
        raise UserError(
            f"optim=muon: nothing that trains is a matrix of attention, an MLP or experts (trained are "
            f"{', '.join([*trained][:4])}): set optim=adamw"
        )
    return found


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """The optimizer's parameter groups. Matrices decay; norms and other vectors don't. Frozen parameters are left out.

    `role` is ROUTER or EXPERTS in groups of their own where their learning rates may differ, else None. `muon` says
    whether Muon updates the group (all of `muon_shapes`) or AdamW.
    """
    trained, optim = trained_parameters(model), config.optim
    routers = {id(p) for router in routers_of(model) for p in router.parameters()}
    experts = expert_names(model)
    apart = set()
    if optim.router_lr_multiplier != 1 or config.router.freezes:
        apart.add(ROUTER)
    if optim.experts_lr_multiplier != 1:
        apart.add(EXPERTS)

    def role(name: str, parameter: nn.Parameter) -> str | None:
        found = ROUTER if id(parameter) in routers else EXPERTS if name in experts else None
        return found if found in apart else None

    by_muon = {id(trained[name]) for name in muon_shapes(model, config)}
    groups = []
    for wanted in (None, *sorted(apart)):
        mine = [parameter for name, parameter in trained.items() if role(name, parameter) == wanted]
        suffix = f"_{wanted}" if wanted else ""
        kinds: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], "muon": []}
        for parameter in mine:
            kinds["muon" if id(parameter) in by_muon else "decay" if parameter.ndim >= 2 else "no_decay"].append(
                parameter
            )
        groups += [
            {
                "params": parameters,
                "weight_decay": 0.0 if kind == "no_decay" else optim.weight_decay,
                "name": f"{kind}{suffix}",
                "role": wanted,
                "muon": kind == "muon",
            }
            for kind, parameters in kinds.items()
        ]
    return groups


def set_learning_rates(groups: Iterable[dict[str, Any]], lr: float, lr_scales: Mapping[str, float]) -> None:
    """`lr`, times the scale of the group's role where there is one."""
    for group in groups:
        group["lr"] = lr * lr_scales.get(group["role"], 1.0)


def expert_names(model: nn.Module) -> set[str]:
    """Names of expert parameters: each rank of an expert group holds its own slice of them."""
    experts = {id(p) for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in experts}


def moments_of(name: str, muon: Collection[str]) -> tuple[str, ...]:
    """`OptimizerState.moments`, where Muon updates the parameters `muon`."""
    return (MOMENTUM,) if name in muon else ADAM_MOMENTS


def zero_states(
    parameters: dict[str, nn.Parameter], moments: Callable[[str], tuple[str, ...]], max_bytes: int
) -> Iterator[States]:
    """`OptimizerState.empty` of these parameters."""
    part: dict[str, nn.Parameter] = {}
    for name, parameter in parameters.items():
        if part and 12 * (parameter.numel() + sum(p.numel() for p in part.values())) > max_bytes:
            yield _zeros(part, moments)
            part = {}
        part[name] = parameter
    if part:
        yield _zeros(part, moments)


def _zeros(part: dict[str, nn.Parameter], moments: Callable[[str], tuple[str, ...]]) -> States:
    states: States = {}
    for name, parameter in part.items():
        for kind in ("weights", *moments(name)):
            states.setdefault(kind, {})[name] = torch.zeros(parameter.shape, dtype=torch.float32)
    return states

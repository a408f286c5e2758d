"""Which of a model's parameters are trained, which decay, and which belong to experts: the same for every engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from moe.engine.base import KINDS, States
from moe.sparse.experts import Experts


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of the trained ones, in an order that all ranks share."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups. Matrices decay; norms and other vectors don't. Frozen parameters are left out."""
    trained = trained_parameters(model).values()
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay, "name": "decay"},
        {"params": vectors, "weight_decay": 0.0, "name": "no_decay"},
    ]


def expert_names(model: nn.Module) -> set[str]:
    """Names of expert parameters: each rank of an expert group holds its own slice of them."""
    experts = {id(p) for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in experts}


def zero_states(parameters: dict[str, nn.Parameter], max_bytes: int) -> Iterator[States]:
    """`OptimizerState.empty` of these parameters."""
    part: dict[str, nn.Parameter] = {}
    for name, parameter in parameters.items():
        if part and 12 * (parameter.numel() + sum(p.numel() for p in part.values())) > max_bytes:
            yield _zeros(part)
            part = {}
        part[name] = parameter
    if part:
        yield _zeros(part)


def _zeros(part: dict[str, nn.Parameter]) -> States:
    return {
        kind: {name: torch.zeros(parameter.shape, dtype=torch.float32) for name, parameter in part.items()}
        for kind in KINDS
    }

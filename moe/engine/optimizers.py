"""The optimizer that a configuration names, the same for every engine."""

from __future__ import annotations

from typing import Any

import torch

from moe.config import Config, OptimizerKind, Precision
from moe.engine.adamw import AdamW
from moe.engine.muon import Muon


def make_optimizer(groups: list[dict[str, Any]], config: Config, device: torch.device) -> AdamW:
    """AdamW, or Muon, over `moe.engine.parameters.parameter_groups`. Muon's caller fills `Muon.matrices`.

    Muon's Newton–Schulz steps compute in float32, with bfloat16 on CUDA in bfloat16.
    """
    optim = config.optim
    adamw: dict[str, Any] = {
        "lr": optim.lr, "betas": (optim.betas[0], optim.betas[1]), "eps": optim.eps, "fused": True,
    }  # fmt: skip
    if optim.kind is OptimizerKind.adamw:
        return AdamW(groups, **adamw)
    half = device.type == "cuda" and config.train.precision is Precision.bfloat16
    dtype = torch.bfloat16 if half else torch.float32
    return Muon(groups, momentum=optim.momentum, dtype=dtype, **adamw)

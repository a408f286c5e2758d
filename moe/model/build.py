"""Builds a model directly on its device: weights are allocated there once, then drawn or read from a checkpoint."""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

from moe.config import Config
from moe.kernels.policy import exact_float32
from moe.model.transformer import Transformer


def build_model(config: Config, device: torch.device, expert_group: ProcessGroup | None = None) -> Transformer:
    """The model of `config` with the initial weights that `train.seed` gives, in float32 on `device`."""
    model = empty_model(config, device, expert_group)
    model.init_weights(config.train.seed)
    return model


def empty_model(
    config: Config,
    device: torch.device,
    expert_group: ProcessGroup | None = None,
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """The same model with uninitialised weights of `dtype`, to be read from a checkpoint.

    Buffers have their initial values.

    A module with buffers must set them in `reset_buffers()`, which its constructor calls too.
    """
    exact_float32(device)
    with torch.device("meta"):
        model = Transformer(config.model, config.router, config.experts, expert_group=expert_group)
    model.to(dtype).to_empty(device=device)
    model.tie_weights()
    for name, module in model.named_modules():
        if any(True for _ in module.buffers(recurse=False)):
            reset = getattr(module, "reset_buffers", None)
            assert callable(reset), f"{name} ({type(module).__name__}) has buffers but no reset_buffers()"
            reset()
    return model

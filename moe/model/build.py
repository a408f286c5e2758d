"""Builds a model directly on its device: weights are allocated there once, then drawn or read from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.overrides import TorchFunctionMode

from moe.config import Config
from moe.kernels.policy import choose_products
from moe.model.transformer import Transformer


def build_model(config: Config, device: torch.device, expert_group: ProcessGroup | None = None) -> Transformer:
    """The model of `config` with the initial weights that `train.seed` gives, in float32 on `device`."""
    model = empty_model(config, device, expert_group)
    model.init_weights(config.train.seed)
    return model


class _NothingDrawn(TorchFunctionMode):
    """`init.normal_` does nothing. On the meta device torch would load its compiler for it, in half a second."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        return keywords["tensor"] if func is nn.init.normal_ else func(*args, **keywords)


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
    choose_products(device)
    with torch.device("meta"), _NothingDrawn():
        model = Transformer(config.model, config.router, config.experts, expert_group=expert_group)
    _allocate(model.to(dtype), device)
    model.tie_weights()
    for name, module in model.named_modules():
        if any(True for _ in module.buffers(recurse=False)):
            reset = getattr(module, "reset_buffers", None)
            assert callable(reset), f"{name} ({type(module).__name__}) has buffers but no reset_buffers()"
            reset()
    return model


def _allocate(model: nn.Module, device: torch.device) -> None:
    """What `Module.to_empty` does. That one asks the meta tensors for tensors like them, for which torch loads its
    compiler."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))

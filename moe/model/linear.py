"""How a linear layer is called, and whether its weight may be used in a joined or fused product instead."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moe.kernels.bfloat16_products import linear
from moe.sparse import Randomness


def project(module: nn.Module, x_BSH: Tensor, randomness: Randomness | None = None) -> Tensor:
    """`module(x)`; an adapter's also gets random numbers, for its dropout."""
    weight = plain_weight(module)
    if weight is not None:
        return linear(x_BSH, weight)
    return module(x_BSH, randomness) if getattr(module, "takes_randomness", False) else module(x_BSH)


def plain_weight(module: nn.Module) -> Tensor | None:
    """The weight [out, in] of a module whose forward pass is `x @ weight.T` and nothing else; None for any other.

    None for: a bias, a subclass or a wrapper (an adapter), a parametrization (it makes a subclass), hooks, a `forward`
    set on the instance, and weights that aren't ordinary tensors (quantised, sharded). Callers then call the module.
    """
    if type(module) is not nn.Linear or module.bias is not None or "forward" in module.__dict__:
        return None
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if any(hooks):
        return None
    weight = module.weight
    return None if type(weight) is not nn.Parameter and is_traceable_wrapper_subclass(weight) else weight

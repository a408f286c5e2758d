"""Adds a trained adapter to the weights that it adapts, tensor by tensor.

Names are those of a checkpoint: the weight `NAME.weight` has `NAME.lora.A`, `NAME.lora.B` and, with DoRA,
`NAME.magnitude`; the experts' `NAME` has `NAME_lora.A` and `NAME_lora.B`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import Tensor

from moe.config import AdapterConfig
from moe.errors import UserError

PARTS = (".lora.A", ".lora.B", ".magnitude", "_lora.A", "_lora.B")


def is_part(name: str) -> bool:
    """Whether this is a tensor of an adapter, which a merged model doesn't have."""
    return name.endswith(PARTS)


def adapted(part: str) -> str:
    """The name of the weight that a tensor of an adapter belongs to."""
    stem = part.removesuffix(".magnitude").removesuffix(".A").removesuffix(".B")
    return stem.removesuffix("_lora") if stem.endswith("_lora") else f"{stem.removesuffix('.lora')}.weight"


def merged(
    name: str, weight: Tensor, names: Collection[str], read: Callable[[str], Tensor], config: AdapterConfig
) -> Tensor:
    """The weight `name` of the merged model, in the dtype of `weight`: W + s·B·A, with DoRA each row scaled to its
    trained length. `read` returns a tensor of the adapter, whose names are `names`. Computed in float32. Raises
    UserError when its shapes don't fit."""
    stem = name.removesuffix(".weight")
    prefix = f"{stem}.lora" if name.endswith(".weight") else f"{name}_lora"
    if f"{prefix}.A" not in names:
        return weight
    a, b = read(f"{prefix}.A").float(), read(f"{prefix}.B").float()
    *experts, out_size, in_size = weight.shape
    if a.shape[:-2] + a.shape[-1:] != (*experts, in_size) or b.shape != (*experts, out_size, a.shape[-2]):
        raise UserError(f"{prefix}: A {list(a.shape)} and B {list(b.shape)} don't fit {name}, {list(weight.shape)}")
    wide = weight.float() + config.scale(a.shape[-2]) * (b @ a)
    if f"{stem}.magnitude" in names:
        magnitude = read(f"{stem}.magnitude").float()
        if magnitude.shape != (out_size,):
            raise UserError(f"{stem}.magnitude: {list(magnitude.shape)} doesn't fit {name}, {list(weight.shape)}")
        wide *= (magnitude / wide.norm(dim=1))[:, None]
    return wide.to(weight.dtype)

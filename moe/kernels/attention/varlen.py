"""`varlen`: torch's FlashAttention 2 over packed documents, with a sliding window. CUDA, half precision.

Legend: B batch, S sequence, N query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

import inspect
from functools import cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention

from moe.kernels.attention.pattern import Attend, document_bounds


@cache
def _arguments() -> frozenset[str]:
    """The parameter names of torch's `varlen_attn`; empty if this torch has no such function."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def varlen_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why it can't run; empty if it can."""
    if device.type != "cuda":
        return f"it needs a CUDA device, this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16, this is {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > 256:
        return f"model.head_dim={head_dim} must be a multiple of 8 and ≤ 256"
    if "window_size" not in _arguments():
        return f"torch {torch.__version__} has no varlen_attn with a window"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "FlashAttention needs compute capability ≥ 8.0"
    return ""


def varlen_attend(
    shape: tuple[int, int],
    window: int | None,
    document_ids_BS: Tensor | None,
    device: torch.device,
    document_lengths: list[int] | None = None,
    *,
    flash3: bool = False,
) -> Attend:
    """With document ids and without lengths the host waits for the device here, to count the ids. `flash3` takes the
    kernels of FlashAttention 3, until a call without it."""
    use_flash3(flash3)
    if document_lengths is None:
        bounds, longest = document_bounds(document_ids_BS, *shape, device), shape[1]
    else:
        bounds, longest = _uploaded([*accumulate(document_lengths, initial=0)], device), max(document_lengths)
    return partial(_varlen, bounds=bounds, longest=longest, window=window)


def use_flash3(wanted: bool) -> None:
    """Makes torch take FlashAttention 3 or its own FlashAttention 2, in the whole process. Raises what the import of
    the package raises."""
    active = attention.current_flash_attention_impl() == "FA3"
    if wanted and not active:
        attention.activate_flash_attention_impl("FA3")
    elif active and not wanted:
        attention.restore_flash_attention_impl()


def _uploaded(numbers: list[int], device: torch.device) -> Tensor:
    """int32, from pinned memory, so that the host goes on while they travel."""
    here = torch.tensor(numbers, dtype=torch.int32)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here


def _varlen(
    q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, bounds: Tensor, longest: int, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    sizes = (-1 if window is None else window - 1, 0)  # keys left of the query's own, keys right of it
    q, k, v = (tensor.flatten(0, 1).contiguous() for tensor in (q_BSND, k_BSGD, v_BSGD))
    # torch 2.11 has no `enable_gqa` and doesn't compare N with G: its kernel takes any N divisible by G.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _arguments() else {}
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=sizes, **grouped)
    assert isinstance(out, Tensor)
    return out.view(*q_BSND.shape[:2], -1)

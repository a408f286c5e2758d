"""`flex`: torch's flex_attention, compiled. CUDA (no backward pass elsewhere), any dtype.

Documents and window change between passes; the mask captures them as tensors, so they cause no recompilation. The
second batch shape compiles once more, for all shapes.
Legend: B batch, S sequence, N query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe.kernels.attention.pattern import Attend
from moe.kernels.policy import compiled


def flex_obstacle(device: torch.device) -> str:
    """Why it can't run; empty if it can."""
    if device.type != "cuda":
        return f"flex_attention has a backward pass on CUDA only, this is {device.type}"
    from torch.utils._triton import has_triton

    return "" if has_triton() else "it needs triton"


def flex_attend(
    shape: tuple[int, int], window: int | None, document_ids_BS: Tensor | None, device: torch.device
) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask

    batch, length = shape
    documents = document_ids_BS
    if documents is None:
        documents = torch.zeros(shape, dtype=torch.int32, device=device)
    reach = torch.full((), length if window is None else window, dtype=torch.int64, device=device)
    # Compiled, it builds the mask block by block; in eager mode it would first allocate [B, S, S] booleans.
    create = compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    block_mask = create(_mask(documents, reach), batch, None, length, length, device=device)
    return partial(_flex, block_mask=block_mask)


def _mask(documents_BS: Tensor, reach: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """flex_attention's mask_mod. It captures only tensors: an int would become a constant of the compiled code."""

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        del h
        return (i >= j) & (i - j < reach) & (documents_BS[b, i] == documents_BS[b, j])

    return seen


def _flex(q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, block_mask: Any) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    function = compiled(flex_attention) if q_BSND.is_cuda else flex_attention
    q, k, v = (tensor.transpose(1, 2) for tensor in (q_BSND, k_BSGD, v_BSGD))
    return function(q, k, v, block_mask=block_mask, enable_gqa=True).transpose(1, 2).flatten(2)

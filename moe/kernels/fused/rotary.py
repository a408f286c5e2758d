"""Rotary position embedding of every head, one pass. The plain reference is in `moe.kernels.rotary`.

Shapes: B batch, S sequence, N heads, D head dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.fused.launch import BLOCKS, Blocks, launch, power_of_two


def rotate(x_BSND: Tensor, cos_S1D: Tensor, sin_S1D: Tensor, out_BSND: Tensor, *, back: bool) -> Tensor:
    """Writes x, with the pairs of dimensions i and i + D/2 rotated by position s's angle, to `out_BSND`; with `back`
    by the negative angle. cos and sin are those of a `RotaryTable`; each tensor's last dimension must be dense."""
    if x_BSND.stride(3) != 1:
        x_BSND = x_BSND.contiguous()
    assert out_BSND.stride(3) == cos_S1D.stride(2) == sin_S1D.stride(2) == 1
    batch, sequence, heads, head_dim = x_BSND.shape
    if x_BSND.numel():
        half, table = power_of_two(head_dim // 2), BLOCKS["rotary"]
        together = min(power_of_two(heads), max(1, table.elements // half))
        tensors = x_BSND, cos_S1D, sin_S1D, out_BSND
        strides = *x_BSND.stride()[:3], *out_BSND.stride()[:3], cos_S1D.stride(0), sin_S1D.stride(0)
        grid = sequence * batch, -(-heads // together)
        constants = {"BACK": back, "HALF": half, "HEADS": together}
        blocks = Blocks(together * half, max(1, min(table.warps, together * half // 256)))  # 8 pairs a thread
        launch(_rotate, grid, blocks, *tensors, *strides, sequence, heads, head_dim // 2,
               **constants)  # fmt: skip
    return out_BSND


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, out_ptr, x_batch, x_position, x_head, out_batch, out_position, out_head,
    cos_position, sin_position, sequence, heads, half, BACK: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // sequence).to(tl.int64)
    position = (tl.program_id(0) % sequence).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    cos = tl.load(cos_ptr + position * cos_position + pair, mask=pair < half, other=0.0).to(tl.float32)[None, :]
    # The table's sine is negated in the first half.
    sin = tl.load(sin_ptr + position * sin_position + half + pair, mask=pair < half, other=0.0).to(tl.float32)[None, :]
    if BACK:
        sin = -sin
    inside = (head < heads)[:, None] & (pair < half)[None, :]
    x_ptr += batch * x_batch + position * x_position
    out_ptr += batch * out_batch + position * out_position
    first = tl.load(x_ptr + head[:, None] * x_head + pair[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + head[:, None] * x_head + half + pair[None, :], mask=inside, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + head[:, None] * out_head + pair[None, :], (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(
        out_ptr + head[:, None] * out_head + half + pair[None, :], (second * cos + first * sin).to(dtype), mask=inside
    )

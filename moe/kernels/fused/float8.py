"""Rounding to float8 with a scale for each vector of a product's contraction: two reads, one write.

The plain reference, and what the scales are, is `moe.kernels.float8_products`.

Shapes: B matrices, V vectors of a matrix, K elements of a vector.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.fused.launch import BLOCKS, Blocks, launch, power_of_two

# Values are rounded to the nearest E4M3 number, ties to even, before they are converted: Triton's interpreter converts
# others wrongly. Below 2^-6 these are the multiples of 2^-9, a float32's last place between 2^14 and 2^15.
SMALLEST_NORMAL: tl.constexpr = tl.constexpr(2.0**-6)
SHIFT: tl.constexpr = tl.constexpr(1.5 * 2.0**14)
COLUMNS = 64  # that a program reads together where vectors are columns: 128 bytes of each row in bfloat16


def quantize(x_BVK: Tensor) -> tuple[Tensor, Tensor]:
    """(float8 values [B, V, K] in this order, the factor [B, V] that gives a vector's values back).

    Columns of a matrix are the vectors of its transposed view; the result's are dense either way.
    """
    matrices, vectors, length = x_BVK.shape
    values = torch.empty(x_BVK.shape, dtype=torch.float8_e4m3fn, device=x_BVK.device)
    inverse = torch.empty(matrices, vectors, dtype=torch.float32, device=x_BVK.device)
    if values.numel():
        blocks = BLOCKS["float8"]
        together = COLUMNS if x_BVK.stride(1) == 1 and x_BVK.stride(2) != 1 else 1
        block = min(blocks.elements // together, power_of_two(length))
        grid = -(-vectors // together), matrices
        constants = {"TOGETHER": together, "BLOCK": block}
        tensors, sizes = (x_BVK, values, inverse), (*x_BVK.stride(), vectors, length)
        launch(_quantize, grid, Blocks(block, blocks.warps), *tensors, *sizes, **constants)
    return values, inverse


@triton.jit
def _quantize(
    x_ptr, values_ptr, inverse_ptr, matrix_stride, vector_stride, stride, vectors, length,
    TOGETHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(1).to(tl.int64)
    vector = tl.program_id(0).to(tl.int64) * TOGETHER + tl.arange(0, TOGETHER)
    there = vector < vectors
    x_ptr += matrix * matrix_stride
    largest = tl.full((TOGETHER, BLOCK), 0.0, tl.float32)
    for start in range(0, length, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = there[:, None] & (place < length)[None, :]
        x = tl.load(x_ptr + vector[:, None] * vector_stride + place[None, :] * stride, mask=inside, other=0.0)
        x = tl.abs(x.to(tl.float32))
        largest = tl.maximum(largest, tl.where(x == x, x, float("inf")))  # an undefined value counts as infinite
    most = tl.maximum(tl.reduce(largest, 1, tl.standard._elementwise_max), 1e-30)
    # 448 = 1.75 · 2^8, so the power of two below 448 / most follows from most's exponent and mantissa; a division on a
    # GPU may be off by a last place. Where most is infinite the scale is 0 and its inverse infinite.
    bits = most.to(tl.int32, bitcast=True)
    finite = bits < 0x7F800000
    exponent = 262 - (bits >> 23) - tl.where((bits & 0x7FFFFF) > 0x600000, 1, 0)
    scale = tl.where(finite, exponent << 23, 0).to(tl.float32, bitcast=True)
    inverse = tl.where(finite, (254 - exponent) << 23, 0x7F800000).to(tl.float32, bitcast=True)
    tl.store(inverse_ptr + matrix * vectors + vector, inverse, mask=there)
    for start in range(0, length, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = there[:, None] & (place < length)[None, :]
        x = tl.load(x_ptr + vector[:, None] * vector_stride + place[None, :] * stride, mask=inside, other=0.0)
        x = x.to(tl.float32) * scale[:, None]
        places = x.to(tl.int32, bitcast=True)
        nearest = ((places + 0x7FFFF + ((places >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < SMALLEST_NORMAL, (x + SHIFT) - SHIFT, nearest)
        out = values_ptr + (matrix * vectors + vector)[:, None] * length + place[None, :]
        tl.store(out, x.to(values_ptr.dtype.element_ty), mask=inside)

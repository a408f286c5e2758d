"""Sums of each token's rows and their backward pass, and zeros for the gradients of idle experts.

The plain references are in `moe.kernels.permute` and `moe.kernels.grouped_swiglu`.

Shapes: T tokens, K places for a token's choices, N rows, H hidden, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.fused.launch import BLOCKS, IDLE_PROGRAMS, Blocks, launch, power_of_two, rows_of

LEAST_COLUMNS = 64  # of a block, when a token has very many places


def sum_rows(rows_NH: Tensor, index_TK: Tensor, weights_TK: Tensor | None, filled_TK: Tensor | None) -> Tensor:
    """Σₖ weights[t, k] · rows[index[t, k]] over the filled places, [T, H] in the rows' dtype.

    Weights of None are 1; `filled_TK` (bool) of None means all.
    """
    rows_NH = rows_of(rows_NH)
    (tokens, places), hidden = index_TK.shape, rows_NH.shape[1]
    out_TH = rows_NH.new_zeros(tokens, hidden) if places == 0 else rows_NH.new_empty(tokens, hidden)
    if places and out_TH.numel():
        blocks, constants = _blocks("sum_rows", places, hidden)
        segments = -(-hidden // blocks.elements)
        optional = index_TK if weights_TK is None else weights_TK.contiguous(), _flags(filled_TK, index_TK)
        sizes = rows_NH.stride(0), hidden, places, segments
        constants |= {"WEIGHTED": weights_TK is not None, "MASKED": filled_TK is not None}
        tensors = rows_NH, index_TK.contiguous(), *optional, out_TH
        launch(_sum_rows, (tokens * segments,), blocks, *tensors, *sizes, **constants)
    return out_TH


def combine_backward(
    dy_TH: Tensor, y_NH: Tensor, weights_TK: Tensor, index_TK: Tensor, filled_TK: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(gradient of the rows [N, H], gradient of the weights [T, K]) of a weighted `sum_rows`, from its result's [T, H].

    Each row must be at exactly one filled place. The weights' gradient is 0 at the others.
    """
    dy_TH, y_NH = rows_of(dy_TH), rows_of(y_NH)
    (tokens, places), hidden = index_TK.shape, y_NH.shape[1]
    drows_NH = torch.empty_like(y_NH, memory_format=torch.contiguous_format)
    dweights_TK = torch.empty_like(weights_TK, memory_format=torch.contiguous_format)
    if hidden == 0:
        return drows_NH, dweights_TK.zero_()
    if dweights_TK.numel():
        blocks, constants = _blocks("combine_backward", places, hidden)
        tensors = dy_TH, y_NH, weights_TK.contiguous(), index_TK.contiguous(), _flags(filled_TK, index_TK)
        sizes = dy_TH.stride(0), y_NH.stride(0), hidden, places
        constants |= {"MASKED": filled_TK is not None}
        launch(_combine_backward, (tokens,), blocks, *tensors, drows_NH, dweights_TK, *sizes, **constants)
    return drows_NH, dweights_TK


def zero_idle(counts_E: Tensor, *grads: Tensor) -> None:
    """Fills the gradients [E, O, I] (contiguous) of experts without rows with 0; the host doesn't wait for counts."""
    for grad in grads:
        assert grad.is_contiguous()
        blocks = BLOCKS["zero_idle"]
        grid = IDLE_PROGRAMS, counts_E.numel()
        launch(_zero_idle, grid, blocks, grad, counts_E, grad[0].numel(), PROGRAMS=grid[0], BLOCK=blocks.elements)


def _blocks(kernel: str, places: int, hidden: int) -> tuple[Blocks, dict[str, int]]:
    """Columns of a block such that all of a token's rows have `BLOCKS[kernel].elements` together."""
    rows, table = power_of_two(places), BLOCKS[kernel]
    columns = min(max(LEAST_COLUMNS, table.elements // rows), power_of_two(hidden))
    return Blocks(columns, table.warps), {"PLACES": rows, "BLOCK": columns}


def _flags(filled_TK: Tensor | None, instead: Tensor) -> Tensor:
    """Booleans as bytes, which Triton loads; a pointer that isn't read where all places are filled."""
    return instead if filled_TK is None else filled_TK.contiguous().view(torch.uint8)


@triton.jit
def _sum_rows(
    rows_ptr, index_ptr, weights_ptr, filled_ptr, out_ptr, stride, hidden, places, segments,
    WEIGHTED: tl.constexpr, MASKED: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    token = (program // segments).to(tl.int64)
    place = tl.arange(0, PLACES)
    column = (program % segments) * BLOCK + tl.arange(0, BLOCK)
    there = place < places
    if MASKED:
        there = there & (tl.load(filled_ptr + token * places + place, mask=there, other=0) != 0)
    row = tl.load(index_ptr + token * places + place, mask=there, other=0)
    inside = there[:, None] & (column < hidden)[None, :]
    values = tl.load(rows_ptr + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if WEIGHTED:
        values = values * tl.load(weights_ptr + token * places + place, mask=there, other=0.0)[:, None]
    total = tl.reduce(values, 0, tl.standard._sum_combine)
    tl.store(out_ptr + token * hidden + column, total.to(out_ptr.dtype.element_ty), mask=column < hidden)


@triton.jit
def _combine_backward(
    dy_ptr, y_ptr, weights_ptr, index_ptr, filled_ptr, drows_ptr, dweights_ptr, dy_stride, y_stride, hidden, places,
    MASKED: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PLACES)
    exists = place < places
    there = exists
    if MASKED:
        there = there & (tl.load(filled_ptr + token * places + place, mask=there, other=0) != 0)
    row = tl.load(index_ptr + token * places + place, mask=there, other=0)
    weight = tl.load(weights_ptr + token * places + place, mask=there, other=0.0).to(tl.float32)
    products = tl.full((PLACES, BLOCK), 0.0, tl.float32)
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = there[:, None] & (column < hidden)[None, :]
        dy = tl.load(dy_ptr + token * dy_stride + column, mask=column < hidden, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row[:, None] * y_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        products += dy[None, :] * y
        drows = (dy[None, :] * weight[:, None]).to(drows_ptr.dtype.element_ty)
        tl.store(drows_ptr + row[:, None] * hidden + column[None, :], drows, mask=inside)
    dweights = tl.reduce(products, 1, tl.standard._sum_combine)
    tl.store(dweights_ptr + token * places + place, dweights.to(dweights_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _zero_idle(grad_ptr, counts_ptr, size, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    expert = tl.program_id(1).to(tl.int64)
    if tl.load(counts_ptr + expert) == 0:
        zeros = tl.full((BLOCK,), 0.0, grad_ptr.dtype.element_ty)
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, PROGRAMS * BLOCK):
            place = start + tl.arange(0, BLOCK)
            tl.store(grad_ptr + expert * size + place, zeros, mask=place < size)

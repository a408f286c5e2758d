"""Products of rows sorted by expert with stacked weights, and the experts' sums of outer products, in one launch each.

A program finds its expert, and which tile of that expert's result it computes, from the counts on the device: the host
launches as many programs as any counts could need and doesn't wait. Sums are float32, in the same order in every run;
float32 factors are not rounded (no TF32). The plain reference is `moe.kernels.grouped_products.per_expert_products`.

Shapes: N rows sorted by expert, E experts, I and O the sizes before and after a product.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.fused.launch import FEW_ROWS, LARGE_SHARED, TILES, Tiles, launch, power_of_two, rows_of
from moe.kernels.grouped_products import GroupedProducts


def triton_products(counts_E: Tensor, size: str | None = None) -> GroupedProducts:
    """These kernels; `outer` gives experts without rows zeros. The counts, int64 on the device, must add up to N.

    `size` is a class of `TILES`; None takes the one for this many rows.
    """
    return GroupedProducts(
        times_weight=lambda rows, weight: times(rows, weight, counts_E, size),
        times_weight_t=lambda rows, weight: times(rows, weight.transpose(1, 2), counts_E, size),
        outer=lambda left, right: outer(left, right, counts_E, size),
        writes_idle=True,
    )


def times(rows_NI: Tensor, weight_EIO: Tensor, counts_E: Tensor, size: str | None = None) -> Tensor:
    """Each row times its expert's matrix; [N, O]. The weight may be a view of any strides."""
    rows_NI = rows_of(rows_NI)
    experts, inner, columns = weight_EIO.shape
    count = rows_NI.shape[0]
    out_NO = rows_NI.new_empty(count, columns)
    if out_NO.numel():
        tiles = tiles_for("rows", rows_NI, experts, size)
        column_tiles = -(-columns // tiles.columns)
        most = (count + experts * (tiles.rows - 1)) // tiles.rows  # each expert's last tile may be a part of one
        sizes = rows_NI.stride(0), *weight_EIO.stride(), inner, columns, experts, column_tiles
        constants = _constants(tiles, experts) | {"EVEN": inner % tiles.depth == 0}
        launch(_times, (most * column_tiles,), tiles, rows_NI, weight_EIO, out_NO, counts_E, *sizes, **constants)
    return out_NO


def outer(left_NO: Tensor, right_NI: Tensor, counts_E: Tensor, size: str | None = None) -> Tensor:
    """leftᵀ · right over each expert's rows; [E, O, I], zeros for an expert without rows."""
    left_NO, right_NI = rows_of(left_NO), rows_of(right_NI)
    experts, rows, columns = counts_E.numel(), left_NO.shape[1], right_NI.shape[1]
    out_EOI = left_NO.new_empty(experts, rows, columns)
    if out_EOI.numel():
        tiles = tiles_for("outer", left_NO, experts, size)
        row_tiles, column_tiles = -(-rows // tiles.rows), -(-columns // tiles.columns)
        sizes = left_NO.stride(0), right_NI.stride(0), rows, columns, experts, row_tiles, column_tiles
        tensors, constants = (left_NO, right_NI, out_EOI, counts_E), _constants(tiles, experts)
        launch(_outer, (experts * row_tiles * column_tiles,), tiles, *tensors, *sizes, **constants)
    return out_EOI


def tiles_for(product: str, rows: Tensor, experts: int, size: str | None = None) -> Tiles:
    """The tiles of `TILES` for a product of these rows, spread over this many experts."""
    if size is None:
        size = "many" if len(rows) >= FEW_ROWS * experts and _has_large_shared(rows.device) else "few"
    return TILES[product, size, rows.dtype]


def _has_large_shared(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin >= LARGE_SHARED


def _constants(tiles: Tiles, experts: int) -> dict[str, Any]:
    shape = {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth, "GROUP": tiles.group}
    # Triton's interpreter multiplies bfloat16 factors as if their bits were whole numbers; in float32 the result is the
    # same, since products of two of them are exact there.
    interpreted = not isinstance(_times, triton.JITFunction)
    return shape | {"EXPERTS": power_of_two(experts), "WIDEN": interpreted, "num_stages": tiles.stages}


@triton.jit
def _total(values):
    return tl.reduce(values, 0, tl.standard._sum_combine)


@triton.jit
def _add_product(left, right, total, WIDEN: tl.constexpr):
    if WIDEN:
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def _tile_at(place, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of the tile at `place` of a matrix of tiles, in groups of `GROUP` rows of tiles."""
    of_group = GROUP * column_tiles
    first = place // of_group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    return first + place % of_group % height, place % of_group // height


@triton.jit
def _times(
    rows_ptr, weight_ptr, out_ptr, counts_ptr, rows_stride, expert_stride, inner_stride, column_stride,
    inner, columns, experts, column_tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, EXPERTS: tl.constexpr,
    WIDEN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    each = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + each, mask=each < experts, other=0).to(tl.int32)
    tiles = (counts + ROWS - 1) // ROWS * column_tiles
    ends = tl.associative_scan(tiles, 0, tl.standard._sum_combine)
    if place < _total(tiles):
        expert = _total((ends <= place).to(tl.int32))
        start = _total(tl.where(each < expert, counts, 0)).to(tl.int64)
        count = _total(tl.where(each == expert, counts, 0))
        of_expert = place - _total(tl.where(each < expert, tiles, 0))
        row_tile, column_tile = _tile_at(of_expert, (count + ROWS - 1) // ROWS, column_tiles, GROUP)
        row = row_tile * ROWS + tl.arange(0, ROWS)
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        k = tl.arange(0, DEPTH)
        # Rows and columns past the end are read from elsewhere in the matrix and never stored.
        x_ptr = rows_ptr + (start + tl.minimum(row, count - 1))[:, None] * rows_stride + k[None, :]
        within = k[:, None].to(tl.int64) * inner_stride + (column % columns)[None, :].to(tl.int64) * column_stride
        w_ptr = weight_ptr + expert.to(tl.int64) * expert_stride + within
        total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
        for begin in range(0, inner, DEPTH):
            there = (k < inner - begin) | EVEN
            x = tl.load(x_ptr, mask=there[None, :], other=0.0)
            w = tl.load(w_ptr, mask=there[:, None], other=0.0)
            total = _add_product(x, w, total, WIDEN)
            x_ptr += DEPTH
            w_ptr += DEPTH * inner_stride
        inside = (row < count)[:, None] & (column < columns)[None, :]
        tl.store(
            out_ptr + (start + row)[:, None] * columns + column[None, :],
            total.to(out_ptr.dtype.element_ty),
            mask=inside,
        )


@triton.jit
def _outer(
    left_ptr, right_ptr, out_ptr, counts_ptr, left_stride, right_stride,
    rows, columns, experts, row_tiles, column_tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, EXPERTS: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    expert = place // (row_tiles * column_tiles)
    row_tile, column_tile = _tile_at(place % (row_tiles * column_tiles), row_tiles, column_tiles, GROUP)
    each = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + each, mask=each < experts, other=0).to(tl.int32)
    start = _total(tl.where(each < expert, counts, 0)).to(tl.int64)
    count = _total(tl.where(each == expert, counts, 0))
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    x_ptr = left_ptr + (start + k)[None, :] * left_stride + (row % rows)[:, None]
    y_ptr = right_ptr + (start + k)[:, None] * right_stride + (column % columns)[None, :]
    total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for begin in range(0, count, DEPTH):
        there = k < count - begin
        x = tl.load(x_ptr, mask=there[None, :], other=0.0)
        y = tl.load(y_ptr, mask=there[:, None], other=0.0)
        total = _add_product(x, y, total, WIDEN)
        x_ptr += DEPTH * left_stride
        y_ptr += DEPTH * right_stride
    line = expert.to(tl.int64) * rows + row
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out_ptr + line[:, None] * columns + column[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)

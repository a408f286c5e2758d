"""Block sizes, and the launch of a kernel on its tensors' device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Blocks(NamedTuple):
    """Elements that a program handles at a time, and its warps (of 32 threads)."""

    elements: int
    warps: int


# Chosen by counting bytes in flight, not by measuring: an H200 hides its latency (about 0.8 µs at 4.8 TB/s) with 30 KiB
# in flight on each of its 132 multiprocessors. A thread with 8 bfloat16 elements per tensor reads each with one 16-byte
# instruction; 8 to 16 resident programs of 128 threads then have 16 to 32 KiB per tensor in flight. More elements a
# thread cost registers, and with them resident programs.
BLOCKS = {
    "swiglu": Blocks(1024, 4),  # 2 or 3 tensors read, up to 3 written
    "weighted_swiglu_backward": Blocks(
        1024, 4
    ),  # the same, and a loop over columns: a weight's gradient is a row's sum
    "sum_rows": Blocks(2048, 4),  # of a token's rows together: 2 choices · 1024 columns
    "combine_backward": Blocks(2048, 4),  # the same, and a loop over columns: the dot product needs the whole row
    "cross_entropy": Blocks(4096, 8),  # of a row of logits; a program loops over the row twice
    "rotary": Blocks(1024, 4),  # pairs: 16 heads of dimension 128, read and written in two halves
    "zero_idle": Blocks(4096, 4),  # writes only
    "float8": Blocks(2048, 4),  # of 64 columns together, or of one row; read twice
}


class Tiles(NamedTuple):
    """What a program of a grouped product computes: `rows` × `columns` of the result, `depth` elements of the dot
    products at a time, with `stages` of them on their way to shared memory. `group` tiles below each other are computed
    before those beside them, so that they find the weight's columns in the L2 cache."""

    rows: int
    columns: int
    depth: int
    group: int
    warps: int
    stages: int


# Chosen by counting, not by measuring (`bash launch/gpu_report.sh` times both classes beside each other). Class "many":
# 128 × 256 results take 2/3 of a byte from the L2 cache for each 64 FLOP of a bfloat16 product, and 144 KiB of the 227
# (H100, H200) or 163 (A100) of shared memory. Class "few", where an expert has fewer than `FEW_ROWS` rows or a GPU less
# shared memory: less is computed of rows that aren't there. float32 products don't use matrix units, and are bound by
# registers.
TILES = {
    ("rows", "many", torch.bfloat16): Tiles(128, 256, 64, 8, 8, 3),
    ("rows", "few", torch.bfloat16): Tiles(64, 128, 64, 8, 4, 3),
    ("rows", "many", torch.float32): Tiles(64, 64, 32, 8, 4, 3),
    ("rows", "few", torch.float32): Tiles(32, 64, 32, 8, 4, 3),
    ("outer", "many", torch.bfloat16): Tiles(128, 256, 64, 8, 8, 3),
    ("outer", "few", torch.bfloat16): Tiles(128, 128, 32, 8, 4, 4),
    ("outer", "many", torch.float32): Tiles(64, 64, 32, 8, 4, 3),
    ("outer", "few", torch.float32): Tiles(64, 64, 16, 8, 4, 3),
}
FEW_ROWS = 256  # of an expert, on average
LARGE_SHARED = 160 << 10  # bytes of a program, that "many" needs
IDLE_PROGRAMS = 128  # per expert: about one a multiprocessor; those of an expert with rows end at once


def launch(kernel: Any, grid: tuple[int, ...], blocks: Blocks | Tiles, *arguments: Any, **constants: Any) -> None:
    """Runs the kernel on the device of the first argument, a tensor. Triton itself takes the current device."""
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, num_warps=blocks.warps, **constants)
    else:
        kernel[grid](*arguments, num_warps=blocks.warps, **constants)


def rows_of(x: Tensor) -> Tensor:
    """x as a matrix [rows, last dimension] whose rows are dense; copied only where its strides don't allow a view."""
    matrix = x.reshape(-1, x.shape[-1])
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def power_of_two(size: int) -> int:
    """The smallest power of two ≥ `size`, as Triton's blocks need it."""
    return 1 << max(size - 1, 0).bit_length()

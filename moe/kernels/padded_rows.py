"""Rows sorted by expert, with each expert's rows padded to one of few sizes, for matrix products by oneDNN.

oneDNN computes bfloat16 products on a CPU with units for them (`bfloat16_products`), and on some CPUs float32 ones
(`float32_products`). It compiles
a kernel for each new number of rows: about 1 ms and 640 KiB, as long as the product itself takes. Routing gives new
numbers at every step. `padded_size` allows 8 sizes per doubling, so kernels are reused, and adds at most an eighth to
more than 512 rows.

Padding rows are zero, so is what a SwiGLU makes of them, and they add nothing to a weight's gradient.

Shapes: N rows sorted by expert, P rows with padding, H row length, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.kernels.bfloat16_products import widens
from moe.kernels.float32_products import uses_onednn

MULTIPLE = 64  # of rows; smaller counts are padded to a power of two
SIZES_PER_DOUBLING = 8


def pads(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN computes the products."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float32):
        return False
    return uses_onednn() or (dtype is torch.bfloat16 and not widens(device, dtype))


def padded_size(count: int) -> int:
    """Rows for an expert's `count` rows: `count` or a little more."""
    if count <= MULTIPLE:
        return 1 << (count - 1).bit_length() if count else 0
    multiple = max(MULTIPLE, (1 << (count - 1).bit_length()) // (2 * SIZES_PER_DOUBLING))
    return -(-count // multiple) * multiple


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """`counts` rows of each expert in places for `sizes` rows."""

    counts: list[int]
    sizes: list[int]

    @classmethod
    def of(cls, counts: list[int], device: torch.device, dtype: torch.dtype) -> PaddedRows:
        """Padded where `pads` says so, else as they are."""
        return cls(counts, [padded_size(count) for count in counts] if pads(device, dtype) else counts)

    def groups(self) -> list[tuple[int, slice]]:
        """(expert, its padded rows) for every expert that has rows."""
        groups, start = [], 0
        for expert, size in enumerate(self.sizes):
            if size:
                groups.append((expert, slice(start, start + size)))
            start += size
        return groups

    def spread(self, rows_NH: Tensor) -> Tensor:
        """rows [N, H] → [P, H], zeros between; the same tensor where nothing is padded."""
        if self.sizes == self.counts:
            return rows_NH
        padded_PH = rows_NH.new_empty(sum(self.sizes), rows_NH.shape[1])
        start = 0
        for count, place in zip(self.counts, padded_PH.split(self.sizes), strict=True):
            place[:count] = rows_NH[start : start + count]
            place[count:] = 0
            start += count
        return padded_PH

    def collect(self, rows_PH: Tensor) -> Tensor:
        """The inverse of `spread`: [P, H] → [N, H] without the padding."""
        if self.sizes == self.counts:
            return rows_PH
        places = zip(self.counts, rows_PH.split(self.sizes), strict=True)
        return torch.cat([place[:count] for count, place in places])

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

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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


class Group(NamedTuple):
    """An expert's rows: among all rows, and among padded ones."""

    expert: int
    rows: slice
    padded: slice

    @property
    def count(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def size(self) -> int:
        return self.padded.stop - self.padded.start


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """`counts` rows of each expert in places for `sizes` rows."""

    counts: list[int]
    sizes: list[int]

    @classmethod
    def of(cls, counts: list[int], device: torch.device, dtype: torch.dtype) -> PaddedRows:
        """Padded where `pads` says so, else as they are."""
        return cls(counts, [padded_size(count) for count in counts] if pads(device, dtype) else counts)

    @property
    def pads(self) -> bool:
        return self.sizes != self.counts

    @property
    def largest(self) -> int:
        """Rows of the largest group, with padding."""
        return max(self.sizes, default=0)

    def groups(self) -> Iterator[Group]:
        """Every expert that has rows."""
        start = padded = 0
        for expert, (count, size) in enumerate(zip(self.counts, self.sizes, strict=True)):
            if count:
                yield Group(expert, slice(start, start + count), slice(padded, padded + size))
            start, padded = start + count, padded + size

    @contextmanager
    def written(self, rows_NH: Tensor, buffer_MH: Tensor, group: Group) -> Iterator[Tensor]:
        """Where to write the group's result [size, H]; without the padding it becomes its rows of `rows_NH`. The buffer
        needs `largest` rows where anything is padded."""
        if group.size == group.count:
            yield rows_NH[group.rows]
            return
        result = buffer_MH[: group.size]
        yield result
        rows_NH[group.rows] = result[: group.count]

    def weights(self, weights_N: Tensor, group: Group) -> Tensor:
        """[size], zeros where padded."""
        weights = weights_N[group.rows]
        return weights if group.size == group.count else F.pad(weights, (0, group.size - group.count))


class RowReader:
    """Reads one expert's rows at a time from x: rows sorted by expert, or, with `tokens_N` (the token of each row),
    tokens. A call with a group returns [size, H], zeros where padded; the next call may overwrite it."""

    def __init__(self, x: Tensor, padding: PaddedRows, tokens_N: Tensor | None = None) -> None:
        self._x, self._tokens_N = x, tokens_N
        copies = tokens_N is not None or padding.pads
        self._buffer_MH = x.new_empty(padding.largest if copies else 0, x.shape[1])

    def __call__(self, group: Group) -> Tensor:
        if self._tokens_N is None and group.size == group.count:
            return self._x[group.rows]
        rows = self._buffer_MH[: group.size]
        if self._tokens_N is None:
            rows[: group.count] = self._x[group.rows]
        else:
            torch.index_select(self._x, 0, self._tokens_N[group.rows], out=rows[: group.count])
        rows[group.count :] = 0
        return rows

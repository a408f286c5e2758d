"""Matrix products of rows sorted by expert with stacked weights, as an interface with one implementation per library.

torch's and one product per expert are here, grouped_gemm's in `megablocks`, Triton's in `fused.gemm`;
`expert_backends` chooses. Shapes: N rows sorted by expert,
E experts, I and O the sizes before and after a product.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from moe.kernels.bfloat16_products import mm


class GroupedProducts(NamedTuple):
    """The three matrix products of a grouped layer, for fixed boundaries between the experts' rows."""

    times_weight: Callable[[Tensor, Tensor], Tensor]  # rows [N, I], weight [E, I, O] → [N, O]
    times_weight_t: Callable[[Tensor, Tensor], Tensor]  # rows [N, I], weight [E, O, I] → [N, O]
    outer: Callable[[Tensor, Tensor], Tensor]  # rows [N, O], rows [N, I] → [E, O, I]
    writes_idle: bool = False  # whether `outer` gives experts without rows zeros; else their part is undefined


def torch_products(counts_E: Tensor) -> GroupedProducts:
    """`F.grouped_mm`: needs 16-byte aligned rows. It leaves results past the last offset uninitialised, so the counts
    must add up to N."""
    offsets_E = counts_E.cumsum(0).int()
    return GroupedProducts(
        times_weight=lambda rows, weight: F.grouped_mm(rows, weight, offs=offsets_E),
        times_weight_t=lambda rows, weight: F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets_E),
        outer=lambda left, right: F.grouped_mm(left.t(), right, offs=offsets_E),
    )


def per_expert_products(counts: list[int]) -> GroupedProducts:
    """One `torch.mm` for each expert that has rows (cuBLAS on CUDA), on any device. The counts are on the host, so that
    on CUDA it has waited for them."""
    ends = list(accumulate(counts))
    groups = [(expert, slice(end - n, end)) for expert, (end, n) in enumerate(zip(ends, counts, strict=True)) if n]

    def times_weight(rows_NI: Tensor, weight_EIO: Tensor) -> Tensor:
        out_NO = rows_NI.new_empty(rows_NI.shape[0], weight_EIO.shape[2])
        for expert, rows in groups:
            mm(rows_NI[rows], weight_EIO[expert], out=out_NO[rows])
        return out_NO

    def outer(left_NO: Tensor, right_NI: Tensor) -> Tensor:
        out_EOI = left_NO.new_empty(len(counts), left_NO.shape[1], right_NI.shape[1])
        for expert, rows in groups:
            mm(left_NO[rows].t(), right_NI[rows], out=out_EOI[expert])
        for expert, count in enumerate(counts):
            if count == 0:
                out_EOI[expert].zero_()
        return out_EOI

    return GroupedProducts(
        times_weight=times_weight,
        times_weight_t=lambda rows, weight: times_weight(rows, weight.transpose(1, 2)),
        outer=outer,
        writes_idle=True,
    )

"""Matrix products of rows sorted by expert with stacked weights, as an interface with one implementation per library.

`torch_products` is here, grouped_gemm's in `megablocks`; `grouped_swiglu` chooses. Shapes: N rows sorted by expert,
E experts, I and O the sizes before and after a product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F


class GroupedProducts(NamedTuple):
    """The three matrix products of a grouped layer, for fixed boundaries between the experts' rows."""

    times_weight: Callable[[Tensor, Tensor], Tensor]  # rows [N, I], weight [E, I, O] → [N, O]
    times_weight_t: Callable[[Tensor, Tensor], Tensor]  # rows [N, I], weight [E, O, I] → [N, O]
    outer: Callable[[Tensor, Tensor], Tensor]  # rows [N, O], rows [N, I] → [E, O, I]; undefined where E has no row


def torch_products(counts_E: Tensor) -> GroupedProducts:
    """`F.grouped_mm`: needs 16-byte aligned rows. It leaves results past the last offset uninitialised, so the counts
    must add up to N."""
    offsets_E = counts_E.cumsum(0).int()
    return GroupedProducts(
        times_weight=lambda rows, weight: F.grouped_mm(rows, weight, offs=offsets_E),
        times_weight_t=lambda rows, weight: F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets_E),
        outer=lambda left, right: F.grouped_mm(left.t(), right, offs=offsets_E),
    )

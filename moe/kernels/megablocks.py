"""`experts.backend=megablocks`: MegaBlocks' permutation kernels and grouped_gemm's products (CUDA, bfloat16).

MegaBlocks (arXiv 2211.15841) computes either block-sparse (its `sparse` operations over stk) or grouped; only the
grouped path is used here. Both packages are optional and imported only for this back-end.

Shapes: T tokens, K choices per token, N = T·K rows sorted by expert, H hidden, E experts.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moe.errors import UserError
from moe.kernels.grouped_products import GroupedProducts
from moe.kernels.permute import RowOrder


@cache
def _packages() -> tuple[Any, Any]:
    """(megablocks.ops, grouped_gemm.backend). Raises UserError that says what to install."""
    try:
        return importlib.import_module("megablocks.ops"), importlib.import_module("grouped_gemm.backend")
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"experts.backend=megablocks must have its packages ({reason}): run `bash launch/install_megablocks.sh`, "
            "which compiles them, or use experts.backend=auto"
        ) from error


def require(device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError unless this back-end can run on this device and dtype."""
    _packages()
    if device.type != "cuda" or dtype is not torch.bfloat16:
        here = f"{str(dtype).removeprefix('torch.')} on {device.type}"
        raise UserError(
            f"experts.backend=megablocks must have bfloat16 on CUDA (train.precision=bfloat16), not {here}; "
            "use experts.backend=auto"
        )


def products(counts: list[int]) -> GroupedProducts:
    """grouped_gemm's products; it takes group sizes as int64 on the host, and contiguous operands."""
    gmm, sizes_E = _packages()[1].gmm, torch.tensor(counts, dtype=torch.int64)
    return GroupedProducts(
        times_weight=lambda rows, weight: gmm(rows.contiguous(), weight.contiguous(), sizes_E),
        times_weight_t=lambda rows, weight: gmm(rows.contiguous(), weight.contiguous(), sizes_E, trans_b=True),
        outer=lambda left, right: gmm(left.contiguous(), right.contiguous(), sizes_E, trans_a=True),
    )


def gather_rows(x_TH: Tensor, order: RowOrder) -> Tensor:
    """`permute.gather_rows` by MegaBlocks' kernel, which needs K choices for every token; [N, H]."""
    return _packages()[0].gather(x_TH, *_bins(order), order.rows_TK.shape[1])


def combine_rows(y_NH: Tensor, weights_TK: Tensor, order: RowOrder) -> Tensor:
    """`permute.combine_rows` by MegaBlocks' kernel; [T, H].

    The weights are applied before it, in float32: the kernel's own weighting would give the router a bfloat16 gradient.
    """
    weights_N = weights_TK.flatten()[order.places_N]
    weighted_NH = (y_NH * weights_N.unsqueeze(1)).to(y_NH.dtype)
    indices_N, expert_ids_N, bins_E = _bins(order)
    return _packages()[0].scatter(weighted_NH, indices_N, expert_ids_N, None, bins_E, order.rows_TK.shape[1])


def _bins(order: RowOrder) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments of MegaBlocks' kernels, int32: sorted choices [N], their experts [N], cumulative rows [E]."""
    counts_E = order.counts_E
    experts_E = torch.arange(counts_E.numel(), dtype=torch.int32, device=counts_E.device)
    expert_ids_N = experts_E.repeat_interleave(counts_E, output_size=order.places_N.numel())
    bins_E = _packages()[0].inclusive_cumsum(counts_E.to(torch.int32), 0)
    return order.places_N.to(torch.int32), expert_ids_N, bins_E.view(-1)

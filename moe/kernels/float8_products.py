"""Grouped products of float8 factors, for `experts.fp8`: twice the speed of bfloat16 on an H100's matrix units.

The products of rows with weights, forward and backward, have both factors rounded to E4M3: 4 significant bits, up to
448 (arXiv 2209.05433). Each vector along the contraction, a row of the input or an output's weights, has a scale of
its own: the largest power of two that keeps it within 448. Sums are float32. The weights' gradients, sums over tokens,
have factors in the rows' dtype.

Scaled back by a power of two, a float8 value is exact in bfloat16. So `rounded` gives the very factors of the GPU's
product to devices without float8 units, and the results are the same but for the order of the sums.

Shapes: N rows sorted by expert, E experts, I and O the sizes before and after a product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.errors import UserError
from moe.kernels.grouped_products import GroupedProducts, torch_products
from moe.kernels.policy import float8_obstacle, runs_fused

MOST = 448.0  # the largest E4M3 number
LEAST = 1e-30  # a vector's largest value counts as at least this, so that its scale is finite
EXPONENT = 0x7F800000  # a float32's bits that are not sign or mantissa: alone, they are a power of two
CAPABILITIES = 9, 10  # for which torch has grouped products of float8 factors, by their first number


def has_float8(device: torch.device) -> bool:
    """Whether this GPU has products of float8 factors."""
    return torch.cuda.get_device_capability(device)[0] in CAPABILITIES


def require_float8(device: torch.device, dtype: torch.dtype) -> str:
    """How the products are computed here, for the start-up log. Raises UserError where they can't be."""
    if device.type != "cuda":
        return "float8 factors, in products of this device's dtype: it has no float8 units"
    if dtype is not torch.bfloat16:
        raise UserError("experts.fp8=true must have bfloat16 on CUDA: add train.precision=bfloat16")
    if not has_float8(device):
        raise UserError("experts.fp8=true must have a GPU like an H100 or a B200, of compute capability 9 or 10")
    return "float8 factors"


def float8_products(counts_E: Tensor) -> GroupedProducts:
    """torch's `scaled_grouped_mm` (CUDA), which doesn't wait for the counts. Vectors are dense and have 16 elements or
    multiples of it, as the configuration's rules have it."""
    offsets_E = counts_E.cumsum(0).int()

    def product(rows: Tensor, weight_EVK: Tensor) -> Tensor:
        """[N, K], [E, V, K] → [N, V]"""
        (rows8, rows_factor), (weight8, weight_factor) = quantize(rows.unsqueeze(0)), quantize(weight_EVK)
        by_vector = F.ScalingType.RowWise  # type: ignore[attr-defined]
        return F.scaled_grouped_mm(  # type: ignore[attr-defined]
            rows8[0], weight8.transpose(1, 2), rows_factor[0], by_vector, weight_factor, by_vector,
            offs=offsets_E, output_dtype=rows.dtype,
        )  # fmt: skip

    return GroupedProducts(
        times_weight=lambda rows, weight: product(rows, weight.transpose(1, 2)),
        times_weight_t=product,
        outer=torch_products(counts_E).outer,
    )


def quantize(x_BVK: Tensor) -> tuple[Tensor, Tensor]:
    """(float8 values [B, V, K], dense; the float32 factor [B, V] that gives the values of a vector [K] back).

    Of a vector with an infinite or undefined value, nothing finite is left.
    """
    if runs_fused(x_BVK) and float8_obstacle(x_BVK.device, x_BVK.dtype) is None:
        from moe.kernels.fused import float8

        return float8.quantize(x_BVK)
    scale_BV1 = _scales(x_BVK, dim=2)
    values = (x_BVK.float() * scale_BV1).to(torch.float8_e4m3fn).contiguous()
    return values, scale_BV1.reciprocal().squeeze(2)


def rounded(x: Tensor, dim: int) -> Tensor:
    """x as a product over `dim` sees it, in x's dtype."""
    scale = _scales(x, dim)
    return ((x * scale).to(torch.float8_e4m3fn).float() / scale).to(x.dtype)


def _scales(x: Tensor, dim: int) -> Tensor:
    ratio = (MOST / x.abs().amax(dim, keepdim=True).float().clamp(min=LEAST)).nan_to_num(nan=0.0)
    return (ratio.view(torch.int32) & EXPONENT).view(torch.float32)

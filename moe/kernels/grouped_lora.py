"""The SwiGLU of many experts, each with low-rank additions to its frozen weights (LoRA, arXiv 2106.09685).

y = W₂' (silu(W₁' x)_gate ⊙ (W₁' x)_up) with W' = W + s·B·A of each row's expert, where W' is never computed:
W' x = W x + s·B (A x). The six products are grouped ones; autograd's backward pass leaves out the gradients of the
frozen W.

Shapes: N rows sorted by expert, H hidden, F feed-forward, E experts, I and O the sizes before and after a product, R
rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe.kernels.bfloat16_products import linear, widens
from moe.kernels.grouped_products import torch_products
from moe.kernels.swiglu import swiglu

ALIGNED = 8  # elements: rows of 16 bytes in bfloat16, which grouped products need

Product = Callable[[Tensor, Tensor], Tensor]  # rows [N, I], weight [E, O, I] → [N, O]


class LowRankPair(NamedTuple):
    """A [E, R, I] and B [E, O, R] of every expert, and the factor s of B·A."""

    a_ERI: Tensor
    b_EOR: Tensor
    scale: float


def lora_ffn(
    x_NH: Tensor,
    counts_E: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up: LowRankPair | None,
    down: LowRankPair | None,
    *,
    loop: bool = False,
) -> Tensor:
    """`x_NH` sorted by expert, `counts_E` rows each → [N, H]; None leaves a weight as it is.

    By `F.grouped_mm` where it can run (`_grouped_mm_runs`), else, or with `loop`, by one product per expert, which on
    CUDA waits for the device.
    """
    if x_NH.shape[0] == 0:  # keeps the graph connected, with gradients that are zero
        parts = [tensor.sum() for pair in (gate_up, down) if pair is not None for tensor in (pair.a_ERI, pair.b_EOR)]
        return x_NH + 0 * torch.stack(parts).sum().to(x_NH.dtype) if parts else x_NH
    grouped = not loop and _grouped_mm_runs(x_NH, down_proj)
    product = _grouped(counts_E) if grouped else looped_product(counts_E.tolist())
    gate_NF, up_NF = _adapted(x_NH, gate_up_proj, gate_up, product).chunk(2, dim=1)
    return _adapted(swiglu(gate_NF, up_NF), down_proj, down, product)


def _adapted(x_NI: Tensor, weight_EOI: Tensor, pair: LowRankPair | None, product: Product) -> Tensor:
    y_NO = product(x_NI, weight_EOI)
    if pair is None:
        return y_NO
    a_ERI, b_EOR, scale = pair
    return y_NO + scale * product(product(x_NI, a_ERI.to(x_NI.dtype)), b_EOR.to(x_NI.dtype))


def looped_product(counts: list[int]) -> Product:
    """The reference: any dtype, device and shape."""

    def product(x_NI: Tensor, weight_EOI: Tensor) -> Tensor:
        rows = zip(x_NI.split(counts), weight_EOI, strict=True)
        return torch.cat([linear(rows_I, weight_OI) for rows_I, weight_OI in rows])

    return product


def _grouped(counts_E: Tensor) -> Product:
    products = torch_products(counts_E)

    def product(x_NI: Tensor, weight_EOI: Tensor) -> Tensor:
        return _Contiguous.apply(products.times_weight_t(x_NI.contiguous(), weight_EOI))  # type: ignore[return-value]

    return product


class _Contiguous(torch.autograd.Function):
    """Makes the incoming gradient contiguous, as the backward pass of `F.grouped_mm` needs it."""

    @staticmethod
    def forward(ctx: object, x_NI: Tensor) -> Tensor:
        return x_NI.view_as(x_NI)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()


def _grouped_mm_runs(x_NH: Tensor, down_proj: Tensor) -> bool:
    """Whether dtype and row lengths (16 bytes' multiples) are those that it takes, and its products aren't slower than
    widened ones; ranks are padded to fit."""
    aligned = all(size * x_NH.element_size() % 16 == 0 for size in down_proj.shape[1:])
    dtypes = (torch.bfloat16,) if x_NH.device.type == "cuda" else (torch.float32, torch.bfloat16)
    return aligned and x_NH.dtype in dtypes and not widens(x_NH.device, x_NH.dtype)

"""How a CPU computes bfloat16 matrix products: by oneDNN, or in float32 from widened factors, chosen by measurement.

On cores without bfloat16 units (AVX512-BF16, AMX) oneDNN's and MKL's bfloat16 products run at about a tenth of the
float32 rate, on Intel cores with AVX512-BF16 alone at half of it. There `mm` widens both factors, multiplies by the
library chosen for float32 (`float32_products`), and rounds the product. Both ways sum in float32 and round once, so
they differ by the order of summation.

Legend: I and O the sizes before and after a product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe.kernels.float32_products import (
    MOST_ERROR,
    LibraryTimes,
    float32_products,
    largest_error,
    one_thread,
    product_seconds,
    uses_onednn,
)

SHAPE = 32, 256, 256  # rows, length of a dot product, columns: 0.5 ms without bfloat16 units
ROUNDS = 10
# The gain was 4 to 10 without bfloat16 units, 1.8 to 2.1 with AVX512-BF16 on Intel, where it takes a fifth off a step,
# and 0.4 with it on AMD. The limit is far from all of them, since a run that resumes must choose what it chose before,
# on a busy machine too.
LEAST_GAIN = 1.2


@dataclass(frozen=True, slots=True)
class NarrowRoute:
    """Whether bfloat16 products are float32 ones of widened factors, and why, for the start-up log."""

    widened: bool
    reason: str

    def __str__(self) -> str:
        if not self.widened:
            return f"bfloat16 matrix products: oneDNN ({self.reason})"
        return (
            f"bfloat16 matrix products: float32, of widened factors ({self.reason}); train.precision=float32 saves the "
            "widening"
        )


_UNMEASURED = NarrowRoute(False, "not measured")
_route = _UNMEASURED


def choose() -> NarrowRoute:
    """Measures both ways, once in a process and on one thread, and uses the faster one from now on. Takes some 10
    ms."""
    global _route
    if _route is _UNMEASURED:
        with one_thread():
            _route = _measured_route()
    return _route


def widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of two matrices of this dtype are computed from widened factors."""
    return _route.widened and dtype is torch.bfloat16 and device.type == "cpu"


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`torch.mm` of two matrices of one dtype, on any device."""
    product = widened_mm if widens(a.device, a.dtype) else torch.mm
    return product(a, b, out=out)


def widened_mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a · b of two bfloat16 matrices, computed in float32 and rounded once."""
    product = torch.mm(a.float(), b.float())
    return product.bfloat16() if out is None else out.copy_(product)


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x [..., I] · weightᵀ → [..., O], as `F.linear`, by the ways chosen for this CPU."""
    if x.device.type == "cpu" and (uses_onednn() or widens(x.device, x.dtype)):
        return _Linear.apply(x, weight_OI)  # type: ignore[return-value]
    return F.linear(x, weight_OI)


class _Linear(torch.autograd.Function):
    @staticmethod
    @float32_products
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight_OI)
        return mm(x.flatten(0, -2), weight_OI.t()).view(*x.shape[:-1], len(weight_OI))

    @staticmethod
    @once_differentiable
    @float32_products
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        grad_TO, shape = grads[0].flatten(0, -2), (*grads[0].shape[:-1], weight_OI.shape[1])
        grad_x = mm(grad_TO, weight_OI).view(shape) if ctx.needs_input_grad[0] else None
        return grad_x, mm(grad_TO.t(), x.flatten(0, -2)) if ctx.needs_input_grad[1] else None


def _measured_route() -> NarrowRoute:
    generator = torch.Generator().manual_seed(0)
    rows, inner, columns = SHAPE
    wide_a = torch.randn(rows, inner, generator=generator)
    wide_b = torch.randn(columns, inner, generator=generator).t()
    a, b = wide_a.bfloat16(), wide_b.bfloat16()
    exact = a.double() @ b.double()
    errors = [largest_error(product(a, b), exact) for product in (torch.mm, widened_mm)]
    times = [(product_seconds(a, b), product_seconds(wide_a, wide_b)) for _ in range(ROUNDS)]
    narrow, wide = (
        LibraryTimes(error, min(each)) for error, each in zip(errors, zip(*times, strict=True), strict=True)
    )
    return decide(narrow, wide)


def decide(narrow: LibraryTimes, wide: LibraryTimes) -> NarrowRoute:
    """Widened where that is as accurate, and a float32 product at least `LEAST_GAIN` times as fast as a bfloat16 one of
    the same shape."""
    if wide.error > MOST_ERROR * narrow.error:
        reason = f"widened factors' error is {wide.error:.0e} of the largest result, oneDNN's {narrow.error:.0e}"
        return NarrowRoute(False, reason)
    gain = narrow.seconds / wide.seconds
    return NarrowRoute(gain >= LEAST_GAIN, f"float32 is {gain:.1f} × as fast")

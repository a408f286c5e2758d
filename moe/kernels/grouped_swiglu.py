"""The SwiGLU of many experts, y = (silu(x Wgᵀ) ⊙ (x Wuᵀ)) Wdᵀ row by row, each row with its expert's weights.

`expert_backends` picks the back-end; `loop_ffn` is the plain reference; the autograd functions of the others are in
`expert_swiglu`.

Shapes: T tokens, N rows sorted by expert, H hidden, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.config import ExpertBackend
from moe.kernels import megablocks
from moe.kernels.expert_swiglu import GroupedSwiGLU, PerExpertSwiGLU
from moe.kernels.float8_products import float8_products
from moe.kernels.grouped_products import per_expert_products, torch_products
from moe.kernels.permute import Combination, combine_rows, gather_rows
from moe.kernels.policy import runs_fused


def grouped_ffn(
    x: Tensor,
    counts_E: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    backend: ExpertBackend,
    combination: Combination | None = None,
    *,
    fp8: bool = False,
) -> Tensor:
    """down(silu(gate(x)) · up(x)) of each row's expert; x [N, H] sorted by expert, N = counts_E.sum().

    With a `combination` x is [T, H]: rows are copied and computed in one function, which doesn't keep the copies for
    the backward pass (but for the loop). If it has weights, the function sums up too and doesn't keep the rows' results
    either; the result is then each token's sum, [T, H].

    With `fp8` the products of rows and weights have float8 factors (`float8_products`); ValueError with another
    back-end than grouped_mm.

    On CUDA the loop, per_expert and megablocks read the counts on the host, which waits for the device once per call;
    triton doesn't wait, nor does grouped_mm (its backward pass without Triton waits for the counts' copy, which the
    forward pass started). On a CPU all but the loop compute one product per expert.
    """
    if fp8 and backend is not ExpertBackend.grouped_mm:
        raise ValueError(f"float8 factors need experts.backend=grouped_mm, not {backend.name}")
    weights_TK, order = combination or (None, None)
    if backend is ExpertBackend.loop:
        x_NH = x if order is None else gather_rows(x, order)
        y_NH = loop_ffn(x_NH, counts_E.tolist(), gate_up_proj, down_proj)
        return y_NH if weights_TK is None or order is None else combine_rows(y_NH, weights_TK, order)
    rows = x.shape[0] if order is None else order.tokens_N.shape[0]
    if x.device.type != "cuda" or rows == 0:
        counts = counts_E.tolist() if rows else [0] * counts_E.numel()
        return PerExpertSwiGLU.apply(x, gate_up_proj, down_proj, counts, weights_TK, order, fp8)  # type: ignore[return-value]
    if backend in (ExpertBackend.megablocks, ExpertBackend.per_expert):
        known = counts_E.tolist()
        by_library = megablocks.products if backend is ExpertBackend.megablocks else per_expert_products
        counts, products = (lambda: known), by_library(known)
    elif backend is ExpertBackend.triton:
        from moe.kernels.fused.gemm import triton_products

        counts, products = counts_E, triton_products(counts_E)
    else:
        counts = counts_E if runs_fused(x) else LateCounts(counts_E)
        products = float8_products(counts_E) if fp8 else torch_products(counts_E)
    return GroupedSwiGLU.apply(x, gate_up_proj, down_proj, counts, products, weights_TK, order)  # type: ignore[return-value]


def loop_ffn(x_NH: Tensor, counts: list[int], gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """The reference: one plain SwiGLU per expert, any dtype, device and shape, with autograd's own backward pass."""
    outputs = []
    for rows_H, gate_up, down in zip(x_NH.split(counts), gate_up_proj, down_proj, strict=True):
        gate_F, up_F = F.linear(rows_H, gate_up).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate_F) * up_F, down))
    return torch.cat(outputs)


class LateCounts:
    """Copies counts from CUDA to the host without making the forward pass wait; calling it returns them.

    The backward pass calls it. It waits for the copy only, not for the work queued behind it, so the GPU stays busy.
    """

    def __init__(self, counts_E: Tensor) -> None:
        self._counts_E = counts_E.to("cpu", non_blocking=True)  # torch copies into pinned memory
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def __call__(self) -> list[int]:
        self._arrived.synchronize()
        return self._counts_E.tolist()

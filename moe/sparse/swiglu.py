"""The SwiGLU of many experts as one autograd function, with the backward pass written out.

y = (silu(x Wgᵀ) ⊙ (x Wuᵀ)) Wdᵀ row by row, each row with its expert's weights. Only the input and gate/up are kept for
the backward pass; the activation is recomputed there (as in SonicMoE, arXiv 2512.14080), with a = silu(g) ⊙ u and σ the
sigmoid:  dWd = dyᵀ a,  da = dy Wd,  du = da ⊙ silu(g),  dg = da ⊙ u ⊙ σ(g)(1 + g(1 − σ(g))),  dW₁ = [dg du]ᵀ x.
The element-wise part is float32 for narrower dtypes.

Shapes: N rows sorted by expert, H hidden, F feed-forward, G = 2F (gate, then up), E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class GroupedProducts(NamedTuple):
    """The three matrix products of a grouped layer, on rows [N, ·] whose expert boundaries are already bound."""

    times_weight: Callable[[Tensor, Tensor], Tensor]  # rows [N, I], weight [E, I, O] → [N, O]
    times_weight_t: Callable[[Tensor, Tensor], Tensor]  # rows [N, I], weight [E, O, I] → [N, O]
    outer: Callable[[Tensor, Tensor], Tensor]  # rows [N, O], rows [N, I] → [E, O, I]; anything for an empty group


def torch_products(counts: list[int], device: torch.device) -> GroupedProducts:
    """`F.grouped_mm`: needs 16-byte aligned rows and int32 offsets. No rows may lie past the last offset (there it
    leaves memory uninitialised), which exact counts guarantee."""
    offsets_E = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device)
    return GroupedProducts(
        times_weight=lambda rows, weight: F.grouped_mm(rows, weight, offs=offsets_E),
        times_weight_t=lambda rows, weight: F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets_E),
        outer=lambda left, right: F.grouped_mm(left.t(), right, offs=offsets_E),
    )


class GroupedSwiGLU(torch.autograd.Function):
    """All experts at once, over any set of grouped products (a GPU's). At least one row."""

    @staticmethod
    def forward(
        ctx: Any, x_NH: Tensor, gate_up_proj: Tensor, down_proj: Tensor, counts: list[int], products: GroupedProducts
    ) -> Tensor:
        x_NH = x_NH.contiguous()
        gate_up_NG = products.times_weight_t(x_NH, gate_up_proj)
        gate_NF, up_NF = gate_up_NG.chunk(2, dim=1)
        ctx.save_for_backward(x_NH, gate_up_proj, down_proj, gate_up_NG)
        ctx.counts, ctx.products = counts, products
        return products.times_weight_t(F.silu(gate_NF).mul_(up_NF), down_proj)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NH: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x_NH, gate_up_proj, down_proj, gate_up_NG = ctx.saved_tensors
        products: GroupedProducts = ctx.products
        dy_NH = dy_NH.contiguous()
        act_NF, dgate_up_NG = _activation_backward(gate_up_NG, products.times_weight(dy_NH, down_proj))
        ddown = products.outer(dy_NH, act_NF)
        dgate_up = products.outer(dgate_up_NG, x_NH)
        # Kernels leave an empty group's gradient unwritten: grouped_gemm always, grouped_mm on some GPUs.
        _zero_idle(ctx.counts, dgate_up, ddown)
        dx_NH = products.times_weight(dgate_up_NG, gate_up_proj) if ctx.needs_input_grad[0] else None
        return dx_NH, dgate_up, ddown, None, None


class PerExpertSwiGLU(torch.autograd.Function):
    """One matrix product per expert. On a CPU `F.grouped_mm` loops too; here each expert's activations are still in the
    cache when the element-wise part and the next product read them, and the next expert reuses that memory."""

    @staticmethod
    def forward(ctx: Any, x_NH: Tensor, gate_up_proj: Tensor, down_proj: Tensor, counts: list[int]) -> Tensor:
        x_NH = x_NH.contiguous()
        gate_up_NG = x_NH.new_empty(x_NH.shape[0], gate_up_proj.shape[1])
        y_NH = torch.empty_like(x_NH)
        act_MF = x_NH.new_empty(max(counts, default=0), down_proj.shape[2])
        for expert, rows in _groups(counts):
            gate_up = gate_up_NG[rows]
            torch.mm(x_NH[rows], gate_up_proj[expert].t(), out=gate_up)
            gate, up = gate_up.chunk(2, dim=1)
            act = torch.ops.aten.silu.out(gate, out=act_MF[: counts[expert]]).mul_(up)
            torch.mm(act, down_proj[expert].t(), out=y_NH[rows])
        ctx.save_for_backward(x_NH, gate_up_proj, down_proj, gate_up_NG)
        ctx.counts = counts
        return y_NH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NH: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x_NH, gate_up_proj, down_proj, gate_up_NG = ctx.saved_tensors
        dy_NH = dy_NH.contiguous()
        dx_NH = torch.empty_like(x_NH) if ctx.needs_input_grad[0] else None
        dgate_up, ddown = torch.empty_like(gate_up_proj), torch.empty_like(down_proj)
        _zero_idle(ctx.counts, dgate_up, ddown)
        dact_MF = x_NH.new_empty(max(ctx.counts, default=0), down_proj.shape[2])
        scratch = torch.empty_like(dact_MF), x_NH.new_empty(dact_MF.shape[0], gate_up_proj.shape[1])
        for expert, rows in _groups(ctx.counts):
            dy = dy_NH[rows]
            dact = torch.mm(dy, down_proj[expert], out=dact_MF[: dy.shape[0]])
            act, dgate_up_rows = _activation_backward(gate_up_NG[rows], dact, scratch)
            torch.mm(dy.t(), act, out=ddown[expert])
            torch.mm(dgate_up_rows.t(), x_NH[rows], out=dgate_up[expert])
            if dx_NH is not None:
                torch.mm(dgate_up_rows, gate_up_proj[expert], out=dx_NH[rows])
        return dx_NH, dgate_up, ddown, None


def _groups(counts: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) of the experts that have any."""
    groups, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            groups.append((expert, slice(start, start + count)))
        start += count
    return groups


def _zero_idle(counts: list[int], *grads: Tensor) -> None:
    for expert, count in enumerate(counts):
        if count == 0:
            for grad in grads:
                grad[expert].zero_()


def _activation_backward(
    gate_up_NG: Tensor, dact_NF: Tensor, scratch: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(silu(g) ⊙ u [N, F], gradient of gate/up [N, G]) from gate/up and the activation's gradient.

    Five passes, in place where the cache gains by it: `dact_NF` is overwritten, and the results lie in `scratch` (at
    least N rows each) where it is given and the dtype needs no widening.
    """
    dtype, work = gate_up_NG.dtype, torch.promote_types(gate_up_NG.dtype, torch.float32)
    gate_NF, up_NF = gate_up_NG.to(work).chunk(2, dim=1)
    dact_NF = dact_NF.to(work)
    if scratch is None or dtype != work:
        scratch = torch.empty_like(dact_NF), torch.empty_like(gate_up_NG, dtype=work)
    act_NF, dgate_up_NG = (buffer[: dact_NF.shape[0]] for buffer in scratch)
    dgate_NF, dup_NF = dgate_up_NG.chunk(2, dim=1)
    torch.ops.aten.silu.out(gate_NF, out=act_NF)
    torch.mul(dact_NF, act_NF, out=dup_NF)
    act_NF.mul_(up_NF)
    dact_NF.mul_(up_NF)
    torch.ops.aten.silu_backward.grad_input(dact_NF, gate_NF, grad_input=dgate_NF)
    return act_NF.to(dtype), dgate_up_NG.to(dtype)

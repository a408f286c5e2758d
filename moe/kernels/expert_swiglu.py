"""The SwiGLU of many experts as one autograd function, with the backward pass written out.

y = (silu(x Wgᵀ) ⊙ (x Wuᵀ)) Wdᵀ row by row, each row with its expert's weights. With a, the activation
silu(g) ⊙ u, and σ the sigmoid:
dWd = dyᵀ a,  da = dy Wd,  du = da ⊙ silu(g),  dg = da ⊙ u ⊙ σ(g)(1 + g(1 − σ(g))),  dW₁ = [dg du]ᵀ x.

The functions take rows, or tokens and a `Combination`. With the latter they copy the tokens' rows into the experts'
order themselves and, with weights w, return each token's sum z = Σ w y. For the backward pass they keep the tokens and
gate/up, but not the rows x: they are copied again, and the activation is recomputed (as in SonicMoE, arXiv 2512.14080).
With weights nothing keeps the rows y either: what needs them is written in a instead, dw = dz · y = (dz Wd) · a and
dWd = dzᵀ (w a).

Shapes: T tokens, N rows sorted by expert, K choices of a token, H hidden, F feed-forward, G = 2F (gate, then up),
E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.kernels.bfloat16_products import mm
from moe.kernels.float8_products import rounded
from moe.kernels.float32_products import float32_products
from moe.kernels.grouped_products import GroupedProducts
from moe.kernels.padded_rows import PaddedRows, RowReader
from moe.kernels.permute import RowOrder, sum_rows
from moe.kernels.swiglu import activation, activation_backward


class GroupedSwiGLU(torch.autograd.Function):
    """All experts at once, with any library's grouped products (on a GPU). Needs at least one row.

    `counts` is the number of rows of each expert: on the device, or a function that the backward pass calls.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        counts: Tensor | Callable[[], list[int]],
        products: GroupedProducts,
        weights_TK: Tensor | None = None,
        order: RowOrder | None = None,
    ) -> Tensor:
        """x [N, H] → [N, H]; with `order` [T, H] → [N, H]; with `weights_TK` too [T, H] → [T, H]."""
        x = x.contiguous()
        gate_up_NG = products.times_weight_t(_rows(x, order), gate_up_proj)
        gate_NF, up_NF = gate_up_NG.chunk(2, dim=1)
        ctx.save_for_backward(x, gate_up_proj, down_proj, gate_up_NG, weights_TK)
        ctx.counts, ctx.products, ctx.order = counts, products, order
        y_NH = products.times_weight_t(activation(gate_NF, up_NF), down_proj)
        return y_NH if weights_TK is None or order is None else sum_rows(y_NH, order, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up_proj, down_proj, gate_up_NG, weights_TK = ctx.saved_tensors
        products: GroupedProducts = ctx.products
        order: RowOrder | None = ctx.order
        needs_dx, needs_dgate_up, needs_ddown = ctx.needs_input_grad[:3]
        dy_NH = _rows(dy.contiguous(), None if weights_TK is None else order)
        dact_NF = products.times_weight(dy_NH, down_proj)
        act_NF, dgate_up_NG, dweights_N = activation_backward(gate_up_NG, dact_NF, _weights_of_rows(weights_TK, order))
        ddown = products.outer(dy_NH, act_NF) if needs_ddown else None
        del dy_NH, dact_NF, act_NF  # their memory is free for the products below
        dgate_up = products.outer(dgate_up_NG, _rows(x, order)) if needs_dgate_up else None
        if not products.writes_idle:  # grouped_gemm's never do, grouped_mm's not on some GPUs
            zero_idle(ctx.counts if isinstance(ctx.counts, Tensor) else ctx.counts(), dgate_up, ddown)
        dx = _to_tokens(products.times_weight(dgate_up_NG, gate_up_proj), order) if needs_dx else None
        return dx, dgate_up, ddown, None, None, _at_places(dweights_N, order), None


class PerExpertSwiGLU(torch.autograd.Function):
    """One matrix product per expert. On a CPU `F.grouped_mm` loops over experts too; here each expert's activations are
    still in the cache when the element-wise part and the next product read them, and the next expert reuses their
    memory. `PaddedRows` says where rows are padded. With `fp8` both factors of a product of rows and weights are those
    that `float8_products` has on a GPU."""

    @staticmethod
    @float32_products
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        counts: list[int],
        weights_TK: Tensor | None = None,
        order: RowOrder | None = None,
        fp8: bool = False,
    ) -> Tensor:
        """x [N, H] → [N, H]; with `order` [T, H] → [N, H]; with `weights_TK` too [T, H] → [T, H]."""
        seen = rounded if fp8 else _unrounded
        padding = PaddedRows.of(counts, x.device, x.dtype)
        x = x.contiguous()
        x_of = RowReader(x, padding, None if order is None else order.tokens_N)
        gate_up_PG = x.new_empty(sum(padding.sizes), gate_up_proj.shape[1])
        y_NH = x.new_empty(sum(counts), x.shape[1])
        act_MF = x.new_empty(padding.largest, down_proj.shape[2])
        y_MH = y_NH.new_empty(padding.largest if padding.pads else 0, x.shape[1])
        for group in padding.groups():
            gate_up = gate_up_PG[group.padded]
            mm(seen(x_of(group), 1), seen(gate_up_proj[group.expert], 1).t(), out=gate_up)
            gate, up = gate_up.chunk(2, dim=1)
            act = torch.ops.aten.silu.out(gate, out=act_MF[: group.size]).mul_(up)
            with padding.written(y_NH, y_MH, group) as y:
                mm(seen(act, 1), seen(down_proj[group.expert], 1).t(), out=y)
        ctx.save_for_backward(x, gate_up_proj, down_proj, gate_up_PG, weights_TK)
        ctx.padding, ctx.order, ctx.seen = padding, order, seen
        return y_NH if weights_TK is None or order is None else sum_rows(y_NH, order, weights_TK)

    @staticmethod
    @once_differentiable
    @float32_products
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up_proj, down_proj, gate_up_PG, weights_TK = ctx.saved_tensors
        padding: PaddedRows = ctx.padding
        order: RowOrder | None = ctx.order
        seen: Callable[[Tensor, int], Tensor] = ctx.seen
        needs_dx, needs_dgate_up, needs_ddown = ctx.needs_input_grad[:3]
        rows, hidden = sum(padding.counts), x.shape[1]
        tokens_N, weights_N = None if order is None else order.tokens_N, _weights_of_rows(weights_TK, order)
        x_of = RowReader(x, padding, tokens_N)
        dy_of = RowReader(dy.contiguous(), padding, None if weights_TK is None else tokens_N)
        dx_NH = x.new_empty(rows, hidden) if needs_dx else None
        dx_MH = x.new_empty(padding.largest if padding.pads else 0, hidden)
        dgate_up = torch.empty_like(gate_up_proj) if needs_dgate_up else None
        ddown = torch.empty_like(down_proj) if needs_ddown else None
        dweights_N = None if weights_N is None else torch.empty_like(weights_N)
        zero_idle(padding.counts, dgate_up, ddown)
        dact_MF = dy.new_empty(padding.largest, down_proj.shape[2])
        scratch = torch.empty_like(dact_MF), dy.new_empty(dact_MF.shape[0], gate_up_proj.shape[1])
        for group in padding.groups():
            dy_rows, weights = dy_of(group), None if weights_N is None else padding.weights(weights_N, group)
            dact = mm(seen(dy_rows, 1), seen(down_proj[group.expert], 0), out=dact_MF[: group.size])
            act, dgate_up_rows, dweights = activation_backward(gate_up_PG[group.padded], dact, weights, scratch)
            if dweights_N is not None and dweights is not None:
                dweights_N[group.rows] = dweights[: group.count]
            if ddown is not None:
                mm(dy_rows.t(), act, out=ddown[group.expert])
            if dgate_up is not None:
                mm(dgate_up_rows.t(), x_of(group), out=dgate_up[group.expert])
            if dx_NH is not None:
                with padding.written(dx_NH, dx_MH, group) as dx_rows:
                    mm(seen(dgate_up_rows, 1), seen(gate_up_proj[group.expert], 0), out=dx_rows)
        dx = None if dx_NH is None else _to_tokens(dx_NH, order)
        return dx, dgate_up, ddown, None, _at_places(dweights_N, order), None, None


def zero_idle(counts: Tensor | list[int], *found: Tensor | None) -> None:
    """Fills the gradients [E, O, I] of experts without rows with 0; a tensor of counts is for Triton."""
    grads = [grad for grad in found if grad is not None]
    if isinstance(counts, Tensor):
        from moe.kernels.fused import rows

        rows.zero_idle(counts, *grads)
        return
    for expert, count in enumerate(counts):
        if count == 0:
            for grad in grads:
                grad[expert].zero_()


def _unrounded(x: Tensor, dim: int) -> Tensor:
    del dim
    return x


def _rows(x: Tensor, order: RowOrder | None) -> Tensor:
    """Tokens' rows in the experts' order; rows as they are."""
    return x if order is None else x.index_select(0, order.tokens_N)


def _to_tokens(dx_NH: Tensor, order: RowOrder | None) -> Tensor:
    """The gradient of the tokens whose copies the rows are; that of the rows as it is."""
    return dx_NH if order is None else sum_rows(dx_NH, order, None)


def _weights_of_rows(weights_TK: Tensor | None, order: RowOrder | None) -> Tensor | None:
    """[N]."""
    return None if weights_TK is None or order is None else weights_TK.flatten().index_select(0, order.places_N)


def _at_places(dweights_N: Tensor | None, order: RowOrder | None) -> Tensor | None:
    """[T, K]; without meaning where a token has no choice."""
    return None if dweights_N is None or order is None else dweights_N[order.rows_TK]

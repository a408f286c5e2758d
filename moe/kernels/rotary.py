"""Rotary position embedding (arXiv 2104.09864) with Hugging Face's `rotate_half` pairs: dimensions i and i + D/2.

`project_rotated` is the fast path for bias-free projections on every device; `rotated` rotates any module's output.

Legend: B batch, S sequence, N query heads, G key/value heads, D head dimension, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.kernels.bfloat16_products import mm
from moe.kernels.float32_products import float32_products
from moe.kernels.policy import runs_fused
from moe.kernels.rope_scaling import rotary_frequencies


@dataclass(slots=True)
class RotaryTable:
    """cos and sin of each position's angles, [S, 1, D]. Both halves of D have the same angles; sin is negated in the
    first half. Both have the scaling's factor, if it has one."""

    cos_S1D: Tensor
    sin_S1D: Tensor


def rotary_table(
    start: int,
    length: int,
    head_dim: int,
    theta: float,
    device: torch.device,
    dtype: torch.dtype,
    scaling: Mapping[str, Any] | None = None,
) -> RotaryTable:
    """Positions start … start+length−1; angle i is position · theta^(−2i/D), or as `model.rope_scaling` has it.

    The angles are float32 products, as in transformers, so that weights trained there see the same rotation here.
    """
    frequencies_D, factor = rotary_frequencies(head_dim, theta, scaling or {}, device)
    positions_S = torch.arange(start, start + length, device=device).float()
    angles_SD = positions_S[:, None] * frequencies_D
    cos_SD, sin_SD = angles_SD.cos(), angles_SD.sin()
    if factor != 1:
        cos_SD, sin_SD = cos_SD * factor, sin_SD * factor
    cos_SD, sin_SD = cos_SD.to(dtype), sin_SD.to(dtype)
    return RotaryTable(torch.cat((cos_SD, cos_SD), 1)[:, None], torch.cat((-sin_SD, sin_SD), 1)[:, None])


class RotaryTables:
    """The table of a forward pass's positions, a slice of one that is kept until the device or dtype changes."""

    def __init__(self, head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None) -> None:
        self.head_dim, self.theta, self.scaling = head_dim, theta, scaling
        self._whole: RotaryTable | None = None

    def __call__(self, start: int, length: int, device: torch.device, dtype: torch.dtype) -> RotaryTable:
        """Positions start … start+length−1."""
        whole, end = self._whole, start + length
        if whole is None or whole.cos_S1D.device != device or whole.cos_S1D.dtype != dtype:
            whole = rotary_table(0, end, self.head_dim, self.theta, device, dtype, self.scaling)
        elif len(whole.cos_S1D) < end:  # doubled, so that generation token by token rarely recomputes it
            whole = rotary_table(0, 2 * end, self.head_dim, self.theta, device, dtype, self.scaling)
        self._whole = whole
        return RotaryTable(whole.cos_S1D[start:end], whole.sin_S1D[start:end])


def rotate(x_BSND: Tensor, table: RotaryTable, *, back: bool = False, out: Tensor | None = None) -> Tensor:
    """Rotates every head by its position's angle, with `back` by the negative angle; no autograd. Writes to `out` if
    given."""
    half, sign = x_BSND.shape[-1] // 2, -1.0 if back else 1.0
    if out is None:
        out = torch.empty_like(x_BSND)
    if runs_fused(x_BSND):
        from moe.kernels.fused import rotary

        return rotary.rotate(x_BSND, table.cos_S1D, table.sin_S1D, out, back=back)
    torch.mul(x_BSND, table.cos_S1D, out=out)
    out[..., :half].addcmul_(x_BSND[..., half:], table.sin_S1D[..., :half], value=sign)
    out[..., half:].addcmul_(x_BSND[..., :half], table.sin_S1D[..., half:], value=sign)
    return out


def project_rotated(
    x_BSH: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, table: RotaryTable
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries [B, S, N, D], rotated keys and plain values [B, S, G, D]; weights are [heads · D, H]."""
    return HandWrittenProjectRotated.apply(x_BSH, q_weight, k_weight, v_weight, table)  # type: ignore[return-value]


def project_rotated_reference(
    x_BSH: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, table: RotaryTable
) -> tuple[Tensor, Tensor, Tensor]:
    """Three products, two rotations, autograd's own backward pass of each."""
    head_dim = table.cos_S1D.shape[-1]
    q, k, v = (F.linear(x_BSH, weight).unflatten(-1, (-1, head_dim)) for weight in (q_weight, k_weight, v_weight))
    return rotated_reference(q, table), rotated_reference(k, table), v


def rotated(x_BSND: Tensor, table: RotaryTable) -> Tensor:
    """Every head rotated by its position's angle."""
    return HandWrittenRotation.apply(x_BSND, table)  # type: ignore[return-value]


def rotated_reference(x_BSND: Tensor, table: RotaryTable) -> Tensor:
    """The definition, with autograd's own backward pass."""
    first, second = x_BSND.chunk(2, -1)
    return x_BSND * table.cos_S1D + torch.cat((second, first), -1) * table.sin_S1D


class HandWrittenRotation(torch.autograd.Function):
    """The backward pass rotates the gradient back; only the table is saved."""

    @staticmethod
    def forward(ctx: Any, x_BSND: Tensor, table: RotaryTable) -> Tensor:
        ctx.table = table
        return rotate(x_BSND, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return rotate(grads[0], ctx.table, back=True), None


class HandWrittenProjectRotated(torch.autograd.Function):
    """One matrix product for q, k and v, then one rotation of q and k together; likewise in the backward pass.

    The weights are three parameters, as in Hugging Face's models. Concatenating them in each call copies little
    compared with the activations and saves two matrix products and two gradient additions.
    """

    @staticmethod
    @float32_products
    def forward(
        ctx: Any, x_BSH: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, table: RotaryTable
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x_BSH, q_weight, k_weight, v_weight)
        ctx.table = table
        head_dim = table.cos_S1D.shape[-1]
        joined = mm(x_BSH.flatten(0, 1), torch.cat((q_weight, k_weight, v_weight)).t())
        heads_BSND = joined.view(*x_BSH.shape[:2], -1, head_dim)
        query_heads, rotated_heads = len(q_weight) // head_dim, (len(q_weight) + len(k_weight)) // head_dim
        turned_BSND = rotate(heads_BSND[:, :, :rotated_heads], table)
        v_BSGD = heads_BSND[:, :, rotated_heads:].clone()  # a view would keep the whole product alive
        return turned_BSND[:, :, :query_heads], turned_BSND[:, :, query_heads:], v_BSGD

    @staticmethod
    @once_differentiable
    @float32_products
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x_BSH, q_weight, k_weight, v_weight = ctx.saved_tensors
        q_BSND, k_BSGD, v_BSGD = grads
        head_dim, dims = q_BSND.shape[-1], (len(q_weight), len(k_weight), len(v_weight))
        heads = [dim // head_dim for dim in dims]
        joined_BSND = q_BSND.new_empty(*x_BSH.shape[:2], sum(heads), head_dim)
        rotate(q_BSND, ctx.table, back=True, out=joined_BSND[:, :, : heads[0]])
        rotate(k_BSGD, ctx.table, back=True, out=joined_BSND[:, :, heads[0] : heads[0] + heads[1]])
        joined_BSND[:, :, heads[0] + heads[1] :] = v_BSGD
        joined_TD = joined_BSND.view(-1, sum(dims))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = mm(joined_TD, torch.cat((q_weight, k_weight, v_weight))).view_as(x_BSH)
        grad_weights: tuple[Tensor | None, ...] = (None, None, None)
        if any(ctx.needs_input_grad[1:4]):
            grad_weights = mm(joined_TD.t(), x_BSH.reshape(joined_TD.shape[0], -1)).split(dims)
        return grad_x, *grad_weights, None

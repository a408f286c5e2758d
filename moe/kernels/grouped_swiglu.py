"""The SwiGLU of many experts as one autograd function, with the backward pass written out.

y = (silu(x Wgᵀ) ⊙ (x Wuᵀ)) Wdᵀ row by row, each row with its expert's weights. Only the input (or what its rows are
copies of) and gate/up are saved for the backward pass; the activation is recomputed there (as in SonicMoE, arXiv
2512.14080), with a = silu(g) ⊙ u and σ the sigmoid:
dWd = dyᵀ a,  da = dy Wd,  du = da ⊙ silu(g),  dg = da ⊙ u ⊙ σ(g)(1 + g(1 − σ(g))),  dW₁ = [dg du]ᵀ x.
The element-wise part is float32 for narrower dtypes.

`resolve_backend` picks the back-end; `loop_ffn` is the plain reference. On CUDA Triton's kernels compute the
element-wise part where `runs_fused` says so.

Shapes: N rows sorted by expert, H hidden, F feed-forward, G = 2F (gate, then up), E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe.config import ExpertBackend, ExpertsConfig
from moe.errors import UserError
from moe.kernels import megablocks
from moe.kernels.bfloat16_products import mm
from moe.kernels.float8_products import float8_products, rounded
from moe.kernels.float32_products import float32_products
from moe.kernels.grouped_products import GroupedProducts, torch_products
from moe.kernels.padded_rows import PaddedRows
from moe.kernels.permute import RowSource
from moe.kernels.policy import runs_fused, wide_dtype
from moe.kernels.swiglu import activation

BLOCK_ROWS = 128  # that a CPU takes through the element-wise passes at a time, so that they stay in a core's cache


def resolve_backend(
    config: ExpertsConfig, device: torch.device, dtype: torch.dtype, shapes: tuple[int, int]
) -> tuple[ExpertBackend, str]:
    """The back-end that will run, and why, for the start-up log; `shapes` is (hidden_size, intermediate_size).

    `auto` picks grouped_mm if it can run here, else the loop. Raises UserError with the reason when `experts.backend`
    names one that can't run here.
    """
    asked = config.backend
    if asked is ExpertBackend.loop:
        return asked, "set by experts.backend"
    if asked is ExpertBackend.megablocks:
        megablocks.require(device, dtype)
        return asked, "set by experts.backend"
    obstacle = _grouped_mm_obstacle(device, dtype, shapes)
    if obstacle is None:
        how = "torch's grouped_mm" if device.type == "cuda" else "one product per expert, as torch's grouped_mm on CPU"
        return ExpertBackend.grouped_mm, how
    if asked is ExpertBackend.grouped_mm:
        raise UserError(f"experts.backend=grouped_mm {obstacle}; use experts.backend=auto or loop")
    return ExpertBackend.loop, f"grouped_mm {obstacle}"


def _grouped_mm_obstacle(device: torch.device, dtype: torch.dtype, shapes: tuple[int, int]) -> str | None:
    """Why grouped_mm can't run, or None if it can. On a CPU it always can."""
    if device.type != "cuda":
        return None
    if dtype is not torch.bfloat16:
        return f"must have bfloat16 rows on CUDA, not {str(dtype).removeprefix('torch.')}"
    if any(size * dtype.itemsize % 16 for size in shapes):
        return f"must have 16-byte aligned rows: hidden and intermediate size {shapes} must be multiples of 8"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "must have a GPU of compute capability 8.0 or newer"
    return None


def grouped_ffn(
    x_NH: Tensor,
    counts_E: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    backend: ExpertBackend,
    source: RowSource | None = None,
    *,
    fp8: bool = False,
) -> Tensor:
    """down(silu(gate(x)) · up(x)) of each row's expert; x [N, H] sorted by expert, N = counts_E.sum().

    With `fp8` the products of rows and weights have float8 factors (`float8_products`); ValueError with another
    back-end than grouped_mm.

    With a `source`, of which `x_NH` is a copy, the backward pass copies the rows again instead of keeping them (but for
    the loop): with k choices a token, a k-th of the memory.

    On CUDA the loop and megablocks read the counts on the host, which waits for the device once per call; grouped_mm
    doesn't wait (its backward pass without Triton waits for the counts' copy, which the forward pass started).
    """
    if fp8 and backend is not ExpertBackend.grouped_mm:
        raise ValueError(f"float8 factors need experts.backend=grouped_mm, not {backend.name}")
    if backend is ExpertBackend.loop:
        return loop_ffn(x_NH, counts_E.tolist(), gate_up_proj, down_proj)
    if x_NH.shape[0] == 0:
        return PerExpertSwiGLU.apply(x_NH, gate_up_proj, down_proj, [0] * counts_E.numel())  # type: ignore[return-value]
    if x_NH.device.type != "cuda":
        return PerExpertSwiGLU.apply(x_NH, gate_up_proj, down_proj, counts_E.tolist(), source, fp8)  # type: ignore[return-value]
    if backend is ExpertBackend.megablocks:
        known = counts_E.tolist()
        counts, products = (lambda: known), megablocks.products(known)
    else:
        counts = counts_E if runs_fused(x_NH) else LateCounts(counts_E)
        products = float8_products(counts_E) if fp8 else torch_products(counts_E)
    return GroupedSwiGLU.apply(x_NH, gate_up_proj, down_proj, counts, products, source)  # type: ignore[return-value]


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


class GroupedSwiGLU(torch.autograd.Function):
    """All experts at once, with any library's grouped products (on a GPU). Needs at least one row.

    `counts` is the number of rows of each expert: on the device, or a function that the backward pass calls.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NH: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        counts: Tensor | Callable[[], list[int]],
        products: GroupedProducts,
        source: RowSource | None = None,
    ) -> Tensor:
        x_NH = x_NH.contiguous()
        gate_up_NG = products.times_weight_t(x_NH, gate_up_proj)
        gate_NF, up_NF = gate_up_NG.chunk(2, dim=1)
        ctx.save_for_backward(gate_up_proj, down_proj, gate_up_NG, *(source or (x_NH,)))
        ctx.counts, ctx.products = counts, products
        return products.times_weight_t(activation(gate_NF, up_NF), down_proj)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NH: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        gate_up_proj, down_proj, gate_up_NG, *kept = ctx.saved_tensors
        products: GroupedProducts = ctx.products
        needs_dx, needs_dgate_up, needs_ddown = ctx.needs_input_grad[:3]
        dy_NH = dy_NH.contiguous()
        act_NF, dgate_up_NG = activation_backward(gate_up_NG, products.times_weight(dy_NH, down_proj))
        ddown = products.outer(dy_NH, act_NF) if needs_ddown else None
        dgate_up = products.outer(dgate_up_NG, _rows_of(kept)) if needs_dgate_up else None
        # Kernels leave an empty group's gradient unwritten: grouped_gemm always, grouped_mm on some GPUs.
        zero_idle(ctx.counts if isinstance(ctx.counts, Tensor) else ctx.counts(), dgate_up, ddown)
        dx_NH = products.times_weight(dgate_up_NG, gate_up_proj) if needs_dx else None
        return dx_NH, dgate_up, ddown, None, None, None


class PerExpertSwiGLU(torch.autograd.Function):
    """One matrix product per expert. On a CPU `F.grouped_mm` loops over experts too; here each expert's activations are
    still in the cache when the element-wise part and the next product read them, and the next expert reuses their
    memory. `PaddedRows` says where rows are padded. With `fp8` both factors of a product of rows and weights are those
    that `float8_products` has on a GPU."""

    @staticmethod
    @float32_products
    def forward(
        ctx: Any,
        x_NH: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        counts: list[int],
        source: RowSource | None = None,
        fp8: bool = False,
    ) -> Tensor:
        seen = rounded if fp8 else _unrounded
        padding = PaddedRows.of(counts, x_NH.device, x_NH.dtype)
        x_PH = padding.spread(x_NH.contiguous())
        gate_up_PG = x_PH.new_empty(x_PH.shape[0], gate_up_proj.shape[1])
        y_PH = torch.empty_like(x_PH)
        act_MF = x_PH.new_empty(max(padding.sizes, default=0), down_proj.shape[2])
        for expert, rows in padding.groups():
            gate_up = gate_up_PG[rows]
            mm(seen(x_PH[rows], 1), seen(gate_up_proj[expert], 1).t(), out=gate_up)
            gate, up = gate_up.chunk(2, dim=1)
            act = torch.ops.aten.silu.out(gate, out=act_MF[: padding.sizes[expert]]).mul_(up)
            mm(seen(act, 1), seen(down_proj[expert], 1).t(), out=y_PH[rows])
        ctx.save_for_backward(gate_up_proj, down_proj, gate_up_PG, *(source or (x_PH,)))
        ctx.padding, ctx.seen = padding, seen
        return padding.collect(y_PH)

    @staticmethod
    @once_differentiable
    @float32_products
    def backward(ctx: Any, dy_NH: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        gate_up_proj, down_proj, gate_up_PG, *kept = ctx.saved_tensors
        padding: PaddedRows = ctx.padding
        seen: Callable[[Tensor, int], Tensor] = ctx.seen
        needs_dx, needs_dgate_up, needs_ddown = ctx.needs_input_grad[:3]
        dy_PH = padding.spread(dy_NH.contiguous())
        dx_PH = torch.empty_like(dy_PH) if needs_dx else None
        dgate_up = torch.empty_like(gate_up_proj) if needs_dgate_up else None
        ddown = torch.empty_like(down_proj) if needs_ddown else None
        x_PH = None
        if dgate_up is not None:
            x_PH = kept[0] if len(kept) == 1 else padding.spread(_rows_of(kept))
        zero_idle(padding.counts, dgate_up, ddown)
        dact_MF = dy_PH.new_empty(max(padding.sizes, default=0), down_proj.shape[2])
        scratch = torch.empty_like(dact_MF), dy_PH.new_empty(dact_MF.shape[0], gate_up_proj.shape[1])
        for expert, rows in padding.groups():
            dy = dy_PH[rows]
            dact = mm(seen(dy, 1), seen(down_proj[expert], 0), out=dact_MF[: dy.shape[0]])
            act, dgate_up_rows = activation_backward(gate_up_PG[rows], dact, scratch)
            if ddown is not None:
                mm(dy.t(), act, out=ddown[expert])
            if dgate_up is not None and x_PH is not None:
                mm(dgate_up_rows.t(), x_PH[rows], out=dgate_up[expert])
            if dx_PH is not None:
                mm(seen(dgate_up_rows, 1), seen(gate_up_proj[expert], 0), out=dx_PH[rows])
        return None if dx_PH is None else padding.collect(dx_PH), dgate_up, ddown, None, None, None


def _unrounded(x: Tensor, dim: int) -> Tensor:
    del dim
    return x


def _rows_of(kept: list[Tensor]) -> Tensor:
    """The rows that were kept, or those of the source that was."""
    return kept[0] if len(kept) == 1 else RowSource(*kept).rows()


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


def activation_backward(
    gate_up_NG: Tensor, dact_NF: Tensor, scratch: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(silu(g) ⊙ u [N, F], gradient of gate/up [N, G]) from gate/up and the activation's gradient.

    In plain PyTorch five element-wise passes, in place to use less cache: `dact_NF` may be overwritten. If `scratch`
    (buffers of at least N rows) is given, the results are views of it.
    """
    if scratch is None and runs_fused(gate_up_NG):
        from moe.kernels.fused import swiglu

        return swiglu.activation_backward(gate_up_NG, dact_NF)
    dtype, work, rows = gate_up_NG.dtype, wide_dtype(gate_up_NG.dtype), dact_NF.shape[0]
    if scratch is None:
        scratch = torch.empty_like(dact_NF), torch.empty_like(gate_up_NG)
    act_NF, dgate_up_NG = (buffer[:rows] for buffer in scratch)
    block = BLOCK_ROWS if gate_up_NG.device.type == "cpu" else max(1, rows)
    if dtype == work:
        for parts in zip(*(one.split(block) for one in (act_NF, dgate_up_NG, gate_up_NG, dact_NF)), strict=True):
            _activation_backward_into(*parts)
        return act_NF, dgate_up_NG
    # Buffers that all blocks use: new ones for each would cost page faults.
    wide = [one.new_empty(min(block, rows), one.shape[1], dtype=work) for one in (act_NF, dgate_up_NG) * 2]
    for start in range(0, rows, block):
        at = slice(start, start + block)
        act, dgate_up, dact, gate_up = (one[: min(block, rows - start)] for one in wide)
        gate_up.copy_(gate_up_NG[at])
        dact.copy_(dact_NF[at])
        _activation_backward_into(act, dgate_up, gate_up, dact)
        act_NF[at], dgate_up_NG[at] = act, dgate_up
    return act_NF, dgate_up_NG


def _activation_backward_into(act_NF: Tensor, dgate_up_NG: Tensor, gate_up_NG: Tensor, dact_NF: Tensor) -> None:
    """Writes the results to the first two; overwrites `dact_NF`."""
    (gate_NF, up_NF), (dgate_NF, dup_NF) = gate_up_NG.chunk(2, dim=1), dgate_up_NG.chunk(2, dim=1)
    torch.ops.aten.silu.out(gate_NF, out=act_NF)
    torch.mul(dact_NF, act_NF, out=dup_NF)
    act_NF.mul_(up_NF)
    dact_NF.mul_(up_NF)
    torch.ops.aten.silu_backward.grad_input(dact_NF, gate_NF, grad_input=dgate_NF)

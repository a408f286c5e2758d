"""SwiGLU (arXiv 2002.05202), a = silu(g) ⊙ u, and its backward pass: each one pass over memory.

da = dy Wd is given:  du = da ⊙ silu(g),  dg = da ⊙ u ⊙ σ(g)(1 + g(1 − σ(g))),  σ the sigmoid.
The plain references are in `moe.kernels.swiglu`.

Shapes: N rows, F feed-forward, G = 2F (gate, then up).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.fused.launch import BLOCKS, launch, rows_of


def swiglu(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """silu(gate) ⊙ up, in their shape and dtype; reads both and writes the result once."""
    gate, up = rows_of(gate_NF), rows_of(up_NF)
    act_NF = gate_NF.new_empty(gate_NF.shape)
    rows, width = gate.shape
    blocks = BLOCKS["swiglu"]
    segments = -(-width // blocks.elements)
    if act_NF.numel():
        strides = gate.stride(0), up.stride(0)
        launch(_forward, (rows * segments,), blocks, gate, up, act_NF, *strides, width, segments, BLOCK=blocks.elements)
    return act_NF


def swiglu_backward(gate_NF: Tensor, up_NF: Tensor, dact_NF: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up from the result's; in their shape and dtype."""
    dgate_NF, dup_NF = gate_NF.new_empty(gate_NF.shape), up_NF.new_empty(up_NF.shape)
    gate, up, dact, dgate, dup = (rows_of(each) for each in (gate_NF, up_NF, dact_NF, dgate_NF, dup_NF))
    _launch_backward(gate, up, dact, None, dgate, dup)
    return dgate_NF, dup_NF


def activation_backward(
    gate_up_NG: Tensor, dact_NF: Tensor, weights_N: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(a = silu(g) ⊙ u [N, F], gradient of gate/up [N, G], None) from gate/up and the gradient of a.

    With `weights_N` (float32): (w a, gradient of gate/up, gradient of w [N]), where `dact_NF` is the gradient of w a.

    The activation overwrites `dact_NF` where its rows are dense.
    """
    dact_NF, dgate_up_NG = rows_of(dact_NF), torch.empty_like(gate_up_NG, memory_format=torch.contiguous_format)
    gate_NF, up_NF = rows_of(gate_up_NG).chunk(2, dim=1)
    dgate_NF, dup_NF = dgate_up_NG.chunk(2, dim=1)
    if weights_N is None:
        _launch_backward(gate_NF, up_NF, dact_NF, dact_NF, dgate_NF, dup_NF)
        return dact_NF, dgate_up_NG, None
    weights_N, dweights_N = weights_N.contiguous(), torch.zeros_like(weights_N, memory_format=torch.contiguous_format)
    rows, width = gate_NF.shape
    if rows * width:
        tensors = gate_NF, up_NF, dact_NF, weights_N, dact_NF, dgate_NF, dup_NF, dweights_N
        strides = [each.stride(0) for each in (gate_NF, up_NF, dact_NF, dact_NF, dgate_NF, dup_NF)]
        blocks = BLOCKS["weighted_swiglu_backward"]
        launch(_weighted_backward, (rows,), blocks, *tensors, *strides, width, BLOCK=blocks.elements)
    return dact_NF, dgate_up_NG, dweights_N


def _launch_backward(gate: Tensor, up: Tensor, dact: Tensor, act: Tensor | None, dgate: Tensor, dup: Tensor) -> None:
    rows, width = gate.shape
    blocks = BLOCKS["swiglu"]
    segments = -(-width // blocks.elements)
    if rows * width == 0:
        return
    tensors = gate, up, dact, dact if act is None else act, dgate, dup
    strides = [each.stride(0) for each in tensors]
    constants = {"WRITE_ACT": act is not None, "BLOCK": blocks.elements}
    launch(_backward, (rows * segments,), blocks, *tensors, *strides, width, segments, **constants)


@triton.jit
def _forward(gate_ptr, up_ptr, act_ptr, gate_stride, up_stride, width, segments, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row = (program // segments).to(tl.int64)
    column = (program % segments) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    act = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(act_ptr + row * width + column, act.to(act_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    gate_ptr, up_ptr, dact_ptr, act_ptr, dgate_ptr, dup_ptr,
    gate_stride, up_stride, dact_stride, act_stride, dgate_stride, dup_stride,
    width, segments, WRITE_ACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // segments).to(tl.int64)
    column = (program % segments) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    dact = tl.load(dact_ptr + row * dact_stride + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    dgate = dact * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dtype = dgate_ptr.dtype.element_ty
    tl.store(dgate_ptr + row * dgate_stride + column, dgate.to(dtype), mask=inside)
    tl.store(dup_ptr + row * dup_stride + column, (dact * silu).to(dtype), mask=inside)
    if WRITE_ACT:
        tl.store(act_ptr + row * act_stride + column, (silu * up).to(dtype), mask=inside)


@triton.jit
def _weighted_backward(
    gate_ptr, up_ptr, dact_ptr, weights_ptr, act_ptr, dgate_ptr, dup_ptr, dweights_ptr,
    gate_stride, up_stride, dact_stride, act_stride, dgate_stride, dup_stride, width, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights_ptr + row).to(tl.float32)
    products = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
        dact = tl.load(dact_ptr + row * dact_stride + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        act = silu * up
        products += dact * act
        dact *= weight
        dgate = dact * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        dtype = dgate_ptr.dtype.element_ty
        tl.store(dgate_ptr + row * dgate_stride + column, dgate.to(dtype), mask=inside)
        tl.store(dup_ptr + row * dup_stride + column, (dact * silu).to(dtype), mask=inside)
        tl.store(act_ptr + row * act_stride + column, (act * weight).to(dtype), mask=inside)
    dweight = tl.reduce(products, 0, tl.standard._sum_combine)
    tl.store(dweights_ptr + row, dweight.to(dweights_ptr.dtype.element_ty))

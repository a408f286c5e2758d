"""Attention by back-end: time, rate, memory, and its error against the plain reference in float32.

Legend: S sequence, N query heads, G key/value heads, D head dimension, W window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.bench.gpu.measure import device_of, forward_backward, milliseconds, peak_gib, random, relative_error
from moe.bench.gpu.record import Record
from moe.bench.gpu.settings import Settings
from moe.config import AttentionBackend
from moe.kernels.attention import make_attend
from moe.kernels.attention.flash3 import flash3_obstacle
from moe.kernels.policy import choose_products

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # Mixtral 8x7B's
LENGTHS, TINY_LENGTHS = (4096, 8192), (48, 64)
CHECKED, TINY_CHECKED = 1024, 32  # the reference is quadratic in memory
ERROR = 2e-2  # bfloat16: each rounding adds up to 2⁻⁹, and several lead to a result


def run(settings: Settings, record: Record) -> None:
    """Measures the device's back-ends that need no compilation."""
    cuda = device_of(settings).type == "cuda"
    choose_products(device_of(settings))  # for the reference
    backends = [AttentionBackend.varlen, AttentionBackend.block] if cuda else [AttentionBackend.block]
    if not flash3_obstacle(device_of(settings), torch.bfloat16, HEAD_DIM):
        backends.insert(0, AttentionBackend.flash3)
    for backend in backends:
        measure(settings, record, backend)


def measure(settings: Settings, record: Record, backend: AttentionBackend, *, backward: bool = True) -> None:
    """Records the error as checks, then time, rate and memory at each length as rows; with and without a window."""
    device = device_of(settings)
    checked = TINY_CHECKED if settings.dry_run else CHECKED
    for window in (None, checked // 2):
        error = relative_error(
            results(backend, checked, window, torch.bfloat16, device, backward=backward),
            results(AttentionBackend.naive, checked, window, torch.float32, device, backward=backward),
        )
        record.check(f"{backend.name}, S={checked}, W={window or 'none'}: relative error", error, ERROR)
    lengths = TINY_LENGTHS if settings.dry_run else LENGTHS
    for length in lengths:
        for window in (None, lengths[0] // 2):
            tensors, gradient = _inputs(length, torch.bfloat16, device, backward=backward)
            attend = make_attend(backend, (1, length), window, None, device)
            passes = forward_backward(attend, tensors, gradient, []) if backward else lambda a=attend, t=tensors: a(*t)
            peak, time_ms = peak_gib(passes, device), milliseconds(passes, device)
            rate = _flops(length, window, backward=backward) / (time_ms / 1e3)
            cells = {"backend": backend.name, "S": length, "W": window, "ms": time_ms, "TFLOP_s": rate / 1e12}
            record.row("forward and backward" if backward else "forward", **cells, peak_GiB=peak)
            if window is None:
                record.headline(f"{backend.name}, S={length}: {time_ms:.3g} ms, {rate / 1e12:,.0f} TFLOP/s")


def _flops(length: int, window: int | None, *, backward: bool) -> float:
    """Two products of [S, D] with the visible keys in the forward pass, five in the backward pass."""
    keys = length if window is None else min(length, window)
    visible = keys - keys * (keys - 1) / (2 * length)
    return (7 if backward else 2) * 2 * length * visible * HEADS * HEAD_DIM


def _inputs(length: int, dtype: torch.dtype, device: torch.device, *, backward: bool) -> tuple[list[Tensor], Tensor]:
    """q [1, S, N, D], k and v [1, S, G, D], and the gradient of the output: the same bfloat16 values in any `dtype`."""
    heads = (HEADS, KV_HEADS, KV_HEADS)
    tensors = [
        random((1, length, count, HEAD_DIM), device, torch.bfloat16, seed).to(dtype).requires_grad_(backward)
        for seed, count in enumerate(heads)
    ]
    return tensors, random((1, length, HEADS * HEAD_DIM), device, torch.bfloat16, len(heads)).to(dtype)


def results(
    backend: AttentionBackend,
    length: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    backward: bool,
) -> list[Tensor]:
    """The output, and the gradients of q, k and v."""
    tensors, gradient = _inputs(length, dtype, device, backward=backward)
    out = make_attend(backend, (1, length), window, None, device)(*tensors)
    return [out.detach(), *(torch.autograd.grad(out, tensors, gradient) if backward else [])]

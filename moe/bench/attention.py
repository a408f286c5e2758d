"""Is windowed attention linear in the sequence length? Counted multiply-adds and measured time per token.

    moe bench attention
    moe bench attention window=1024

Legend: B batch, S sequence, N query heads, G key/value heads, D head dimension, W window.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moe.bench.clock import conditions
from moe.bench.results import Cell, Results, ResultTable
from moe.bench.settings import counted, spread
from moe.config import AttentionBackend
from moe.errors import UserError
from moe.kernels.attention import make_attend

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 32


def _forward_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """q kᵀ and p v, from the shapes [B, N, S, D]; counts every key of the call, masked or not."""
    batch, heads, queries, dim = q
    return 4 * batch * heads * queries * k[2] * dim


def _backward_flops(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """q kᵀ again, then the gradients of p, v, q and k: five products; the forward pass has two."""
    return _forward_flops(q, k, v) * 5 // 2


CPU_SDPA = {  # torch's counter only knows the GPU's SDPA operators
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_flops,
}


def pass_over(length: int, window: int | None, device: torch.device) -> Callable[[], None]:
    """A function that runs one forward and backward pass of `block` attention over one sequence."""
    generator = torch.Generator().manual_seed(0)
    sizes = (HEADS, KV_HEADS, KV_HEADS)
    tensors: list[Tensor] = [
        torch.randn(1, length, heads, HEAD_DIM, generator=generator).to(device).requires_grad_() for heads in sizes
    ]
    upstream = torch.randn(1, length, HEADS * HEAD_DIM, generator=generator).to(device)

    def run() -> None:
        attend = make_attend(AttentionBackend.block, (1, length), window, None, device)
        torch.autograd.grad(attend(*tensors), tensors, upstream)

    return run


def multiply_adds_per_token(length: int, window: int | None) -> float:
    """Multiply-adds of all heads of one layer, forward and backward, counted while the passes run on the CPU."""
    run = pass_over(length, window, torch.device("cpu"))
    with FlopCounterMode(display=False, custom_mapping=CPU_SDPA) as counter:
        run()
    return counter.get_total_flops() / 2 / length


def seconds_per_token(lengths: list[int], window: int | None, runs: int = 7) -> list[list[float]]:
    """Of each length's `runs` passes. The lengths alternate, so that other load on the machine affects them alike."""
    device = torch.device("cpu")
    passes = [pass_over(length, window, device) for length in lengths]
    times: list[list[float]] = [[] for _ in lengths]
    for turn in range(runs + 1):
        for index, run in enumerate(passes):
            start = time.perf_counter()
            run()
            if turn:  # the first turn warms up
                times[index].append((time.perf_counter() - start) / lengths[index])
    return times


COUNTED, TIMED = (2048, 16384), (4096, 16384)  # tokens


def run(overrides: list[str]) -> Results:
    """Work and time per token, and their ratios at two lengths each. Raises UserError."""
    window = _window(overrides)
    work = [multiply_adds_per_token(length, window) for length in COUNTED]
    times = seconds_per_token(list(TIMED), window)
    seconds = [statistics.median(each) for each in times]
    rows: list[list[Cell]] = [
        ["multiply-adds", *(f"{value:,.0f} at {length:,}" for value, length in zip(work, COUNTED, strict=True))],
        ["time", *(f"{value * 1e6:.2f} µs at {length:,}" for value, length in zip(seconds, TIMED, strict=True))],
    ]
    return Results(
        [ResultTable(["per token", "short sequence", "long sequence"], rows)],
        [
            f"block attention on CPU, forward and backward, W={window}, {HEADS} heads / {KV_HEADS} KV, head_dim "
            f"{HEAD_DIM}, {conditions('wall-clock')}; medians of {counted(len(times[0]), 'alternating round')}",
            f"ratio time per round {spread([b / a for a, b in zip(*times, strict=True)])}",
        ],
        {"ratio multiply-adds per token {}": work[1] / work[0], "ratio time per token {}": seconds[1] / seconds[0]},
    )


def _window(overrides: list[str], default: int = 512) -> int:
    window = default
    for override in overrides:
        key, _, value = override.partition("=")
        if key != "window" or not value.isdecimal() or int(value) < 1:
            raise UserError(f"bench attention {override}: its only key is window=N, a number of tokens ≥ 1")
        window = int(value)
    return window

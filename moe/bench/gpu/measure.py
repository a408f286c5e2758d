"""Timing and comparing on a device: CUDA events, medians, peak memory, relative errors."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from moe.bench.gpu.settings import Settings


def device_of(settings: Settings) -> torch.device:
    return torch.device("cpu") if settings.dry_run else torch.device("cuda", 0)


def milliseconds(action: Callable[[], object], device: torch.device, *, warm_up: int = 3, runs: int = 10) -> float:
    """Median of `runs` calls after `warm_up` others; on CUDA by events around each call, all queued at once."""
    for _ in range(warm_up):
        action()
    if device.type == "cpu":
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            action()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)
    torch.cuda.synchronize(device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, stop in events:
        start.record()
        action()
        stop.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def peak_gib(action: Callable[[], object], device: torch.device) -> float | None:
    """GiB that torch allocated at most during one call, over what it held before; None on a CPU."""
    if device.type == "cpu":
        action()
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    action()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30


def relative_error(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """The largest ‖found − wanted‖ / ‖wanted‖ over the pairs, each norm in float64."""
    errors = [float((f.double() - w.double()).norm() / w.double().norm()) for f, w in zip(found, wanted, strict=True)]
    return max(errors, key=lambda error: float("inf") if error != error else error)  # NaN is the largest


def random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """N(0, 1) from a generator on the device. Never zeros: some products run faster on them."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, device=device, dtype=torch.float32, generator=generator).to(dtype)


def forward_backward(
    forward: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor, weights: list[Tensor]
) -> Callable[[], None]:
    """One forward and one backward pass, ready to be called; gradients are dropped."""

    def passes() -> None:
        torch.autograd.grad(forward(*inputs), [*inputs, *weights], gradient)

    return passes

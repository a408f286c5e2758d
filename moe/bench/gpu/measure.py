"""Time, peak memory and relative errors on a device."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from moe.bench.gpu.settings import Settings


def device_of(settings: Settings) -> torch.device:
    return torch.device("cpu") if settings.dry_run else torch.device("cuda", 0)


def milliseconds(action: Callable[[], object], device: torch.device, *, warm_up: int = 3, runs: int = 10) -> float:
    """Median over `runs` calls after `warm_up` calls; on CUDA timed by events, with all calls queued at once."""
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


def copy_bandwidth(size: int, device: torch.device) -> float:
    """Bytes per second, read and written both counted."""
    source = random((size // 4,), device, torch.float32)
    target = torch.empty_like(source)
    return 2 * size / (milliseconds(lambda: target.copy_(source), device) / 1e3)


def peak_gib(action: Callable[[], object], device: torch.device) -> float | None:
    """Peak GiB that torch allocated during one call, less those allocated before; None on a CPU."""
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


def kept_bytes(forward: Callable[[], object], apart: Iterable[Tensor]) -> int:
    """Bytes that `forward` saves for its backward pass, each storage once, without those of the tensors `apart`."""
    left_out = {tensor.untyped_storage().data_ptr() for tensor in apart}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()
    total = sum(saved.values())
    del outputs  # kept until here, so that no two storages have one address
    return total


def relative_error(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """The largest ‖found − wanted‖ / ‖wanted‖ over the pairs, each norm in float64."""
    errors = [float((f.double() - w.double()).norm() / w.double().norm()) for f, w in zip(found, wanted, strict=True)]
    return max(errors, key=lambda error: float("inf") if error != error else error)  # NaN is the largest


def random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """N(0, 1) from a generator on the device. Not zeros, with which products run faster on a GPU."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, device=device, dtype=torch.float32, generator=generator).to(dtype)


def forward_backward(
    forward: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor, weights: list[Tensor]
) -> Callable[[], None]:
    """A function that runs one forward and one backward pass and discards the gradients."""

    def passes() -> None:
        torch.autograd.grad(forward(*inputs), [*inputs, *weights], gradient)

    return passes

"""Each Triton kernel beside its plain code, at the shape of Mixtral's sparse layer: time, bandwidth, error."""

from __future__ import annotations

import importlib.util
import os

import torch

from moe.bench.gpu.measure import copy_bandwidth, device_of, milliseconds
from moe.bench.gpu.record import Record
from moe.bench.gpu.settings import Settings
from moe.kernels.policy import fused_obstacle, plain_kernels

SHAPE = {"tokens": 8192, "choices": 2, "hidden": 4096, "width": 14336}
CHECKED_SHAPE = SHAPE | {"tokens": 1024}
TINY_SHAPE = {"tokens": 4, "choices": 2, "hidden": 64, "width": 96}
DTYPE = torch.bfloat16


def run(settings: Settings, record: Record) -> None:
    """Raises RuntimeError with the reason if no kernel runs on this GPU. A dry run takes Triton's interpreter."""
    device, dry_run = device_of(settings), settings.dry_run
    if dry_run and importlib.util.find_spec("triton") is None:
        record.headline("not tried: triton isn't installed")
        return
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    elif (obstacle := fused_obstacle(device, DTYPE)) is not None:
        raise RuntimeError(f"training takes the plain code here: {obstacle}")
    _check(TINY_SHAPE if dry_run else CHECKED_SHAPE, device, record)
    _measure(TINY_SHAPE if dry_run else SHAPE, device, record)


def _check(shape: dict[str, int], device: torch.device, record: Record) -> None:
    from moe.kernels.fused.check import TOLERANCES, pairs, relative_error

    for ragged in (False, True):
        for name, _, fused, plain in pairs(device, DTYPE, ragged=ragged, **shape):  # type: ignore[arg-type]
            with plain_kernels():
                wanted = plain()
            error = max(relative_error(mine, other) for mine, other in zip(fused(), wanted, strict=True))
            record.check(f"{name}{', ragged' * ragged}: relative error", error, TOLERANCES[DTYPE])


def _measure(shape: dict[str, int], device: torch.device, record: Record) -> None:
    from moe.kernels.fused.check import pairs

    tiny = shape is TINY_SHAPE
    bandwidth = copy_bandwidth(1 << 20 if tiny else 1 << 30, device)
    record.facts(copy_GB_per_s=bandwidth / 1e9)
    runs = 1 if tiny else 10  # the interpreter takes its time
    all_fused = all_plain = 0.0
    for name, moved, fused, plain in pairs(device, DTYPE, in_place=True, **shape):  # type: ignore[arg-type]
        fused_ms = milliseconds(fused, device, runs=runs)
        with plain_kernels():
            plain_ms = milliseconds(plain, device, runs=runs)
        rate = moved / fused_ms * 1e3
        cells = {"kernel": name, "GB": moved / 1e9, "fused_ms": fused_ms, "plain_ms": plain_ms}
        record.row("kernels", **cells, TB_s=rate / 1e12, of_copy=f"{rate / bandwidth:.1%}")
        all_fused, all_plain = all_fused + fused_ms, all_plain + plain_ms
    record.headline(f"all kernels {all_fused:.3g} ms, their plain code {all_plain:.3g} ms")

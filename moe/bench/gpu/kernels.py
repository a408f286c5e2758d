"""Each Triton kernel beside its plain code, at the shape of Mixtral's sparse layer: time, bandwidth, error. Grouped
products, with each class of tiles, are beside one cuBLAS product per expert, with FLOP/s."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import chain
from typing import TYPE_CHECKING

import torch

from moe.bench.gpu.measure import copy_bandwidth, device_of, milliseconds
from moe.bench.gpu.record import Record
from moe.bench.gpu.settings import Settings
from moe.kernels.float8_products import has_float8
from moe.kernels.policy import fused_obstacle, gemm_obstacle, plain_kernels

if TYPE_CHECKING:
    from moe.kernels.fused.pairs import Pair

DTYPE = torch.bfloat16
CHECKED_TOKENS = 1024


def run(settings: Settings, record: Record) -> None:
    """Raises RuntimeError with the reason if no kernel runs on this GPU. A dry run takes Triton's interpreter."""
    device, dry_run = device_of(settings), settings.dry_run
    if dry_run and importlib.util.find_spec("triton") is None:
        record.headline("not tried: triton isn't installed")
        return
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    elif (fault := fused_obstacle(device, DTYPE)) is not None:
        raise RuntimeError(f"training takes the plain code here: {fault}")
    from moe.kernels.comparison import relative_error
    from moe.kernels.fused.check import TOLERANCES
    from moe.kernels.fused.pairs import MIXTRAL, Sizes, float8_pairs, gemm_pairs, pairs

    shape = Sizes(tokens=4, hidden=64, width=96, vocab=64) if dry_run else MIXTRAL

    def every(shape: Sizes, *, in_place: bool) -> Iterator[Pair]:
        yield from pairs(device, DTYPE, shape, in_place=in_place)
        if dry_run or has_float8(device):
            yield from float8_pairs(device, DTYPE, shape)

    obstacle = None if dry_run else gemm_obstacle(device, DTYPE)
    if obstacle is not None:
        record.facts(grouped_products_left_out=obstacle)

    def products(shape: Sizes) -> Iterator[Pair]:
        return gemm_pairs(device, DTYPE, shape) if obstacle is None else iter(())

    fewer = replace(shape, tokens=min(shape.tokens, CHECKED_TOKENS))
    for name, _, fused, plain, _ in chain(every(fewer, in_place=False), products(fewer)):
        found = fused()
        with plain_kernels():
            error = relative_error(found, plain())
        record.check(f"{name}: largest error, of the largest result", error, TOLERANCES[DTYPE])
    bandwidth = copy_bandwidth(1 << 20 if dry_run else 1 << 30, device)
    record.facts(copy_GB_per_s=bandwidth / 1e9, **asdict(shape))
    runs, warm_up = (1, 0) if dry_run else (10, 3)  # the interpreter takes its time
    all_fused = all_plain = 0.0
    for name, moved, fused, plain, _ in every(shape, in_place=True):
        fused_ms = milliseconds(fused, device, warm_up=warm_up, runs=runs)
        with plain_kernels():
            plain_ms = milliseconds(plain, device, warm_up=warm_up, runs=runs)
        rate = moved / fused_ms * 1e3
        cells = {"kernel": name, "GB": moved / 1e9, "fused_ms": fused_ms, "plain_ms": plain_ms}
        record.row("kernels", **cells, TB_s=rate / 1e12, of_copy=f"{rate / bandwidth:.1%}")
        all_fused, all_plain = all_fused + fused_ms, all_plain + plain_ms
    for name, moved, fused, plain, flops in products(shape):  # plain: cuBLAS, one product per expert
        fused_ms = milliseconds(fused, device, warm_up=warm_up, runs=runs)
        plain_ms = milliseconds(plain, device, warm_up=warm_up, runs=runs)
        cells = {"product": name, "GB": moved / 1e9, "TFLOP": flops / 1e12, "fused_ms": fused_ms, "plain_ms": plain_ms}
        rates = {f"{side}_TFLOP_s": flops / ms / 1e9 for side, ms in (("fused", fused_ms), ("plain", plain_ms))}
        record.row("grouped products", **cells, **rates)
    record.headline(f"all kernels of one pass {all_fused:.3g} ms, their plain code {all_plain:.3g} ms")

"""Mixtral's sparse layer by expert back-end, and with and without Triton's kernels: time, rate, memory, error.

Each back-end computes the routers' own choices, and uniform ones beside them. `kept` is what the forward pass saves for
the backward pass, the layer's input included and its weights left out.

Legend: B sequences, S positions, T tokens, H hidden.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moe.bench.gpu.measure import (
    device_of,
    forward_backward,
    kept_bytes,
    milliseconds,
    peak_gib,
    random,
    relative_error,
)
from moe.bench.gpu.models import on_device, one_layer
from moe.bench.gpu.record import Record
from moe.bench.gpu.settings import Settings
from moe.bench.routing import OWN, UNIFORM, uniform_routing
from moe.config import Config
from moe.kernels.expert_backends import candidates
from moe.kernels.float8_products import has_float8
from moe.kernels.policy import plain_kernels
from moe.sparse.balance import max_violation
from moe.train.metrics import measure_peak_flops

TOKENS, TINY_TOKENS = 8192, 64
FP8, WITHOUT = " with fp8", " without Triton"
PLAIN = "grouped_mm" + WITHOUT
# bfloat16: each rounding adds up to 2⁻⁹, and several lead to a result. The reference is float32 with the same weights.
ERROR = 3e-2
FP8_ERROR = 1e-1  # each factor up to a sixteenth, a sum's errors together about a thirtieth


def run(settings: Settings, record: Record) -> None:
    """Measures every back-end that runs here and compares it with the float32 loop over experts."""
    device, dry_run = device_of(settings), settings.dry_run
    tokens = TINY_TOKENS if dry_run else TOKENS
    config = one_layer(["experts.backend=loop"], dry_run=dry_run)
    wanted = _results(_mlp(config, device), config, tokens, torch.float32)
    model = config.model
    flops = 18 * tokens * config.router.experts_per_token * model.hidden_size * model.intermediate_size
    peak = measure_peak_flops(device, torch.bfloat16)
    record.facts(tokens=tokens, TFLOP_forward_and_backward=flops / 1e12)
    record.facts(product_TFLOP_s=peak / 1e12, floor_ms=flops / peak * 1e3)
    times, kept = dict[str, float](), dict[str, float]()
    for backend in _back_ends(device, config):
        overrides = [f"experts.backend={backend.removesuffix(WITHOUT).removesuffix(FP8)}"]
        config = one_layer([*overrides, f"experts.fp8={str(backend.endswith(FP8)).lower()}"], dry_run=dry_run)
        mlp = _mlp(config, device).to(torch.bfloat16)
        with plain_kernels() if backend == PLAIN else nullcontext():
            error = relative_error(_results(mlp, config, tokens, torch.bfloat16), wanted)
            own = _measure(mlp, config, tokens)
            with uniform_routing(mlp):
                uniform = _measure(mlp, config, tokens)
        times[backend], kept[backend] = own["ms"], own["kept_GiB"]
        for routing, found in ((OWN, own), (UNIFORM, uniform)):
            rate = flops / (found["ms"] / 1e3)
            speed = {"TFLOP_s": rate / 1e12, "of_product": f"{rate / peak:.1%}"}
            record.row("back-ends", backend=backend, routing=routing, **found, **speed)
        most = FP8_ERROR if backend.endswith(FP8) else ERROR
        record.check(f"{backend}: relative error of output and gradients", error, most)
        best = min((name for name in times if not name.endswith(FP8)), key=lambda name: times[name])
        share = 100 * flops / (times[best] / 1e3) / peak
        if best == backend:  # what it is required to do, under its own routing
            beside = f"{best}, T={tokens:,}, own routing, MaxVio {own['MaxVio']:.2f}"
            record.figure("speed", share, beside)
            record.figure("kept", kept[best], beside)
        record.headline(f"{best} {times[best]:.4g} ms, {share:.1f} % of the product, {kept[best]:.3g} GiB kept")
        del mlp  # frees gigabytes before the next back-end


def _measure(mlp: nn.Module, config: Config, tokens: int) -> dict[str, Any]:
    """A row's cells: MaxVio, the time of a forward and a backward pass, and memory."""
    weights = list(mlp.parameters())
    device = weights[0].device
    x_BSH, gradient_BSH = _inputs(config, tokens, torch.bfloat16, device)
    with torch.no_grad():
        violation = float(max_violation(mlp(x_BSH)[1].counts_E))
    passes = forward_backward(lambda x: mlp(x)[0], [x_BSH], gradient_BSH, [*weights])
    kept = kept_bytes(lambda: mlp(x_BSH)[0], weights) / 2**30
    peak = peak_gib(passes, device)
    return {"MaxVio": violation, "ms": milliseconds(passes, device), "kept_GiB": kept, "peak_GiB": peak}


def _back_ends(device: torch.device, config: Config) -> list[str]:
    """Those that run here: the reference, those of which `auto` takes the fastest, and variants of grouped_mm."""
    shapes = config.model.hidden_size, config.model.expert_size
    names = ["loop", *(backend.name for backend in candidates(device, torch.bfloat16, shapes))]
    if device.type != "cuda" or has_float8(device):
        names.append("grouped_mm" + FP8)
    return names if device.type != "cuda" else [*names, PLAIN]


def _mlp(config: Config, device: torch.device) -> nn.Module:
    """A float32 layer, the same in every call, with weights rounded to bfloat16, so that casting changes none."""
    mlp = on_device(config, device).get_submodule("model.layers.0.mlp")
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.copy_(parameter.bfloat16())
    return mlp


def _inputs(config: Config, tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """x and the gradient of the output [1, T, H]: the same bfloat16 values in any `dtype`."""
    shape = (1, tokens, config.model.hidden_size)
    x_BSH, gradient_BSH = (random(shape, device, torch.bfloat16, seed).to(dtype) for seed in (3, 4))
    return x_BSH.requires_grad_(), gradient_BSH


def _results(mlp: nn.Module, config: Config, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradients of x and of every weight."""
    weights = list(mlp.parameters())
    x_BSH, gradient_BSH = _inputs(config, tokens, dtype, weights[0].device)
    y_BSH = mlp(x_BSH)[0]
    return [y_BSH.detach(), *torch.autograd.grad(y_BSH, [x_BSH, *weights], gradient_BSH)]

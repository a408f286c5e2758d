"""A training step of a model with 3.1 B parameters, 0.98 B of them active: speed and memory, measured and planned."""

from __future__ import annotations

import gc
import math
import statistics
import time
from dataclasses import dataclass

import torch

from moe.bench.gpu.hardware import bandwidth, device_name, plan_here, stated
from moe.bench.gpu.measure import device_of
from moe.bench.gpu.models import on_device, step_overrides
from moe.bench.gpu.record import Record
from moe.bench.gpu.settings import Settings
from moe.bench.routing import OWN, UNIFORM, uniform_routing
from moe.bench.stepper import Stepper
from moe.config import Config
from moe.config.compose import load_config
from moe.distributed import rendezvous
from moe.distributed.mesh import Mesh
from moe.plan import Plan, count_parameters, flops_per_token
from moe.train.metrics import measure_peak_flops

WARM_UP, STEPS = 2, 5
MICRO_BATCHES = 4
RECOMPUTE = ("none", "mlp", "block")  # values of model.recompute; the first that fits is measured


@dataclass(frozen=True, slots=True)
class TimedSteps:
    """The median of the steps' seconds and of their MaxVio, and each one's loss, warm-up included."""

    seconds: float
    max_violation: float
    losses: list[float]


def run(settings: Settings, record: Record) -> None:
    """Raises torch.OutOfMemoryError if not even the last of `RECOMPUTE` fits."""
    device = device_of(settings)
    mesh = rendezvous.start(1)
    try:
        peak = measure_peak_flops(device, torch.bfloat16)
        moved, source = bandwidth(device)
        record.facts(product_TFLOP_s=peak / 1e12, plan_bandwidth_GB_s=moved, bandwidth_is=source)
        for recompute in RECOMPUTE:
            overrides = [*step_overrides(dry_run=settings.dry_run, micro_batches=MICRO_BATCHES)]
            overrides += [f"model.recompute={recompute}"]
            plan = plan_here(overrides, device, peak, moved)
            planned = {"recompute": recompute, "planned_GB": plan.memory.step_peak / 1e9}
            if not plan.fits and recompute != RECOMPUTE[-1]:
                record.row("memory", **planned, outcome="not tried: over the plan")
                continue
            try:
                _measure(overrides, mesh, plan, peak, record)
                record.row("memory", **planned, outcome="ran")
                break
            except torch.OutOfMemoryError:
                record.row("memory", **planned, outcome="out of memory")
                if recompute == RECOMPUTE[-1]:
                    raise
            gc.collect()
            torch.cuda.empty_cache()
    finally:
        rendezvous.stop()


def _measure(overrides: list[str], mesh: Mesh, plan: Plan, peak: float, record: Record) -> None:
    config = load_config(overrides)
    step = build(config, mesh)
    own, cuda = _timed(step), mesh.device.type == "cuda"
    allocated = torch.cuda.max_memory_allocated(mesh.device) / 1e9 if cuda else None
    reserved = torch.cuda.max_memory_reserved(mesh.device) / 1e9 if cuda else None
    first = own.losses[0]
    record.check("first loss, relative difference from ln V", abs(first / math.log(config.model.vocab_size) - 1), 0.05)
    tokens = config.train.global_batch_size * config.train.sequence_length
    total, active = count_parameters(config)
    record.facts(parameters=total, active_parameters=active, tokens_a_step=tokens, micro_batches=MICRO_BATCHES)
    record.facts(recompute=config.model.recompute.name, first_loss=first, last_loss=own.losses[-1])
    rows = {
        "seconds a step": (own.seconds, plan.times.in_turn),
        "tokens/s": (tokens / own.seconds, tokens / plan.times.in_turn),
        "peak allocated, GB": (allocated, plan.memory.step_peak / 1e9),
        "peak reserved, GB": (reserved, plan.needed_gb),
    }
    for name, (measured, planned) in rows.items():
        record.row("measured and planned (at the measured peak)", quantity=name, measured=measured, planned=planned)
    rate = tokens * flops_per_token(config) / own.seconds
    violation = f"MaxVio {own.max_violation:.2f}"
    record.figure("mfu", 100 * rate / peak, f"{tokens:,} tokens a step, own routing, {violation}")
    record.headline(f"{tokens / own.seconds:,.0f} tokens/s, MFU {rate / peak:.1%} of the product, {violation}")
    _by_routing(OWN, own, config, peak, mesh.device, record)
    with uniform_routing(step.engine.model):
        _by_routing(UNIFORM, _timed(step), config, peak, mesh.device, record)


def _by_routing(
    routing: str, steps: TimedSteps, config: Config, peak: float, device: torch.device, record: Record
) -> None:
    """MFU against the measured product and, of a GPU whose data sheet is known, against its stated peak."""
    tokens, known = config.train.global_batch_size * config.train.sequence_length, stated(device_name(device))
    rate = tokens * flops_per_token(config) / steps.seconds
    record.row(
        "MFU by routing",
        routing=routing,
        MaxVio=steps.max_violation,
        seconds_a_step=steps.seconds,
        tokens_s=tokens / steps.seconds,
        MFU_of_product=f"{rate / peak:.1%}",
        MFU_of_stated_peak=None if known is None else f"{rate / known.peak_tflops / 1e12:.1%}",
    )


def _timed(step: Stepper) -> TimedSteps:
    """`STEPS` steps after a warm-up, which peaks of memory leave out. Raises RuntimeError for a skipped step."""
    times, violations, losses = list[float](), list[float](), list[float]()
    device = step.mesh.device
    for number in range(WARM_UP + STEPS):
        if device.type == "cuda" and number == WARM_UP:
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        done = step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        losses.append(done.metrics["lm_loss"])
        if number >= WARM_UP:
            times.append(time.perf_counter() - start)
            violations.append(done.metrics["max_violation"])
    return TimedSteps(statistics.median(times), statistics.median(violations), losses)


def build(config: Config, mesh: Mesh) -> Stepper:
    """A Stepper whose model's weights are drawn on the device."""
    return Stepper(config, mesh, on_device(config, mesh.device))

"""A training step of a model with 3.1 B parameters, 0.98 B of them active: speed and memory, measured and planned."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time

import torch

from moe.bench.gpu.measure import device_of
from moe.bench.gpu.models import on_device, step_overrides
from moe.bench.gpu.record import Record
from moe.bench.gpu.settings import Settings
from moe.bench.stepper import Stepper
from moe.config import Config, PlanConfig
from moe.config.compose import load_config
from moe.distributed import rendezvous
from moe.distributed.mesh import Mesh
from moe.plan import Plan, count_parameters, flops_per_token, make_plan
from moe.train.metrics import measure_peak_flops

WARM_UP, STEPS = 2, 5
MICRO_BATCHES = 4
RECOMPUTE = ("none", "mlp", "block")  # values of model.recompute; the first that fits is measured


def run(settings: Settings, record: Record) -> None:
    """Raises torch.OutOfMemoryError if not even the last of `RECOMPUTE` fits."""
    device = device_of(settings)
    mesh = rendezvous.start(1)
    try:
        peak = measure_peak_flops(device, torch.bfloat16)
        for recompute in RECOMPUTE:
            overrides = [*step_overrides(dry_run=settings.dry_run, micro_batches=MICRO_BATCHES)]
            overrides += [f"model.recompute={recompute}"]
            plan = _plan(overrides, device, peak)
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
    times, losses, violation = [], [], math.nan
    for number in range(WARM_UP + STEPS):
        if mesh.device.type == "cuda" and number == WARM_UP:
            torch.cuda.reset_peak_memory_stats(mesh.device)
        start = time.perf_counter()
        done = step()
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        losses.append(done.metrics["lm_loss"])
        violation = done.metrics["max_violation"]
        if number >= WARM_UP:
            times.append(time.perf_counter() - start)
    record.check(
        "first loss, relative difference from ln V", abs(losses[0] / math.log(config.model.vocab_size) - 1), 0.05
    )
    tokens = config.train.global_batch_size * config.train.sequence_length
    seconds = statistics.median(times)
    speed, mfu = tokens / seconds, tokens / seconds * flops_per_token(config) / peak
    total, active = count_parameters(config)
    cuda = mesh.device.type == "cuda"
    record.facts(parameters=total, active_parameters=active, tokens_a_step=tokens, micro_batches=MICRO_BATCHES)
    record.facts(recompute=config.model.recompute.name, first_loss=losses[0], last_loss=losses[-1])
    rows = {
        "seconds a step": (seconds, plan.times.in_turn),
        "tokens/s": (speed, tokens / plan.times.in_turn),
        "peak allocated, GB": (
            torch.cuda.max_memory_allocated(mesh.device) / 1e9 if cuda else None,
            plan.memory.step_peak / 1e9,
        ),
        "peak reserved, GB": (torch.cuda.max_memory_reserved(mesh.device) / 1e9 if cuda else None, plan.needed_gb),
        "MFU against a measured product": (mfu, None),
        "MaxVio": (violation, None),
    }
    for name, (measured, planned) in rows.items():
        record.row("measured and planned (at the measured peak)", quantity=name, measured=measured, planned=planned)
    record.headline(f"{speed:,.0f} tokens/s, MFU {mfu:.1%} of {peak / 1e12:,.0f} TFLOP/s")


def build(config: Config, mesh: Mesh) -> Stepper:
    """A Stepper whose model's weights are drawn on the device."""
    return Stepper(config, mesh, on_device(config, mesh.device))


def _plan(overrides: list[str], device: torch.device, peak: float) -> Plan:
    """The plan for one rank on this machine, with `peak`, a measured FLOP/s, and an H100's stated bandwidth."""
    cuda = device.type == "cuda"
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else host
    hardware = {
        "name": "here", "device": device.type, "nodes": 1, "gpus_per_node": 1, "memory_gb": memory / 1e9,
        "reserved_gb": 1.5, "host_memory_gb": host / 1e9, "peak_tflops": peak / 1e12,
        "peak_tflops_float32": peak / 1e12, "memory_bandwidth_gbytes_per_s": 3350,
        "intra_node_gbytes_per_s": 1, "inter_node_gbytes_per_s": 1,
    }  # fmt: skip
    settings = [f"hardware.{name}={value}" for name, value in hardware.items()]
    return make_plan(load_config([*overrides, "hardware=custom", *settings, "plan.imbalance=1"], "plan", PlanConfig))

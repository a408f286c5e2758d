"""`parallel.offload_optimizer`: a few steps with and without it, which must give the same losses."""

from __future__ import annotations

import gc
import statistics
import time

import torch

from moe.bench.gpu.measure import device_of
from moe.bench.gpu.models import step_overrides
from moe.bench.gpu.record import Record
from moe.bench.gpu.settings import Settings
from moe.bench.gpu.step import build
from moe.config.compose import load_config
from moe.distributed import rendezvous
from moe.distributed.mesh import Mesh

STEPS = 4
LAYERS = ["model.num_hidden_layers=4"]  # 1 B parameters: 12 GB of host memory, which are pinned quickly
SAME_LOSS = 1e-3  # both reduce and update in float32, but sum in different orders


def run(settings: Settings, record: Record) -> None:
    """On a CPU neither side offloads, since the engine refuses to."""
    cuda = device_of(settings).type == "cuda"
    mesh = rendezvous.start(1)
    try:
        here = _steps(settings, mesh, record, offload=False)
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        away = _steps(settings, mesh, record, offload=cuda)
    finally:
        rendezvous.stop()
    gap = max(abs(a / b - 1) for a, b in zip(away, here, strict=True))
    record.check("losses with and without, largest relative difference", gap, SAME_LOSS)


def _steps(settings: Settings, mesh: Mesh, record: Record, *, offload: bool) -> list[float]:
    """The losses of `STEPS` steps; records a row with their time and memory."""
    overrides = [*step_overrides(dry_run=settings.dry_run), *([] if settings.dry_run else LAYERS)]
    config = load_config([*overrides, f"parallel.offload_optimizer={str(offload).lower()}"])
    cuda = mesh.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(mesh.device)
    before = torch.cuda.memory_allocated(mesh.device) if cuda else 0  # by an engine whose memory isn't free yet
    step, times, losses, violations = build(config, mesh), [], [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        done = step()
        times.append(time.perf_counter() - start)
        losses.append(done.metrics["lm_loss"])
        violations.append(done.metrics["max_violation"])
    seconds = statistics.median(times[1:])
    peak = (torch.cuda.max_memory_allocated(mesh.device) - before) / 1e9 if cuda else None
    tokens = config.train.global_batch_size * config.train.sequence_length
    name = "in the host's memory" if offload else "on the device"
    speeds = {"seconds_a_step": seconds, "tokens_s": tokens / seconds, "MaxVio": violations[-1]}
    record.row("optimizer", optimizer=name, **speeds, peak_GB=peak)
    record.headline(f"{name}: {seconds:.3g} s a step")
    return losses

"""Profiles the 3 B model's step: operators and kernels by their time on the device, and the device's idle time."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from moe.bench.gpu.measure import device_of
from moe.bench.gpu.models import step_overrides
from moe.bench.gpu.record import Record
from moe.bench.gpu.settings import Settings
from moe.bench.gpu.step import build
from moe.config.compose import load_config
from moe.distributed import rendezvous

WARM_UP, ROWS, GAPS = 2, 25, 10
MAX_TRACE_BYTES = 12 << 20  # a larger trace is left out


def run(settings: Settings, record: Record) -> None:
    """Profiles one step of one micro-batch, with MLP recomputation to leave memory for the profiler."""
    cuda = device_of(settings).type == "cuda"
    mesh = rendezvous.start(1)
    try:
        step = build(load_config([*step_overrides(dry_run=settings.dry_run), "model.recompute=mlp"]), mesh)
        for _ in range(WARM_UP):
            step()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=activities) as profiled:
            step()
            if cuda:
                torch.cuda.synchronize()
    finally:
        rendezvous.stop()
    kind = "CUDA" if cuda else "CPU"
    _tables(profiled.key_averages(), settings, record, kind)
    _gaps(profiled.events(), record, kind)
    _keep_trace(profiled, settings, record)


def _tables(averages: Any, settings: Settings, record: Record, kind: str) -> None:
    """Records operators, with the device time of the kernels that they launch themselves, and kernels; leaves out named
    ranges."""
    order = "self_device_time_total" if kind == "CUDA" else "self_cpu_time_total"
    text = averages.table(sort_by=order, row_limit=ROWS, max_name_column_width=90)
    (settings.out / "profile.txt").write_text(text + "\n", encoding="utf-8")
    events = sorted((each for each in averages if not each.is_user_annotation), key=lambda each: -getattr(each, order))
    kernels = [each for each in events if each.device_type.name == kind]
    if not kernels:
        raise RuntimeError("the profiler saw nothing on the device")
    total = sum(getattr(each, order) for each in kernels)
    operators = [each for each in events if each.device_type.name == "CPU"]
    for title, listed in (("by operator", operators), ("by kernel", kernels)):
        for each in listed[:ROWS]:
            spent = getattr(each, order)
            cells = {"name": each.key[:100], "calls": each.count, "ms": spent / 1e3}
            record.row(title, **cells, share=f"{spent / total:.1%}")


def _gaps(events: Any, record: Record, kind: str) -> None:
    """Records the device's idle time during the step, and its longest idle intervals."""
    there = [each for each in events if each.device_type.name == kind and not each.is_user_annotation]
    spans = sorted((each.time_range.start, each.time_range.end, each.name) for each in there)
    first, end, before = spans[0]
    begin, idle, gaps = first, 0.0, []
    for start, stop, name in spans[1:]:
        if start > end:
            idle += start - end
            gaps.append((start - end, before, name))
        if stop > end:
            end, before = stop, name
    span = end - begin
    record.facts(step_ms=span / 1e3, idle_ms=idle / 1e3, idle_share=f"{idle / span:.1%}", gaps=len(gaps))
    record.headline(f"device busy {1 - idle / span:.1%} of {span / 1e3:,.0f} ms")
    for length, before, after in sorted(gaps, reverse=True)[:GAPS]:
        record.row("longest gaps", ms=length / 1e3, after=before[:80], before=after[:80])


def _keep_trace(profiled: Any, settings: Settings, record: Record) -> None:
    """Writes trace.json.gz, for a trace viewer, unless it is too large."""
    plain, packed = Path(settings.work) / "trace.json", settings.out / "trace.json.gz"
    profiled.export_chrome_trace(str(plain))
    with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=6) as target:
        shutil.copyfileobj(source, target)
    size = packed.stat().st_size
    if size > MAX_TRACE_BYTES:
        packed.unlink()
    record.facts(trace_bytes=size, trace_kept="yes" if size <= MAX_TRACE_BYTES else "no: too large")

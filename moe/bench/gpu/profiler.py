"""Where the time of the 3 B model's step goes: operators by their time on the device, and the device's idle time."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
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
    """One micro-batch, one step, recomputing the MLPs so that it fits beside the profiler."""
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
    averages = profiled.key_averages()
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    text = averages.table(sort_by=order, row_limit=ROWS, max_name_column_width=90)
    (settings.out / "profile.txt").write_text(text + "\n", encoding="utf-8")
    total = sum(getattr(each, order) for each in averages)
    for each in sorted(averages, key=lambda each: -getattr(each, order))[:ROWS]:
        spent = getattr(each, order)
        record.row(
            "by operator or kernel", name=each.key[:100], calls=each.count, ms=spent / 1e3, share=f"{spent / total:.1%}"
        )
    _gaps(profiled.events(), record, DeviceType.CUDA if cuda else DeviceType.CPU)
    _keep_trace(profiled, settings, record)


def _gaps(events: Any, record: Record, kind: DeviceType) -> None:
    """Time of the step in which nothing ran on the device, and the longest such times."""
    spans = sorted(
        (each.time_range.start, each.time_range.end, each.name) for each in events if each.device_type == kind
    )
    if not spans:
        raise RuntimeError("the profiler saw nothing on the device")
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
    """trace.json.gz, for a trace viewer."""
    plain, packed = Path(settings.work) / "trace.json", settings.out / "trace.json.gz"
    profiled.export_chrome_trace(str(plain))
    with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=6) as target:
        shutil.copyfileobj(source, target)
    size = packed.stat().st_size
    if size > MAX_TRACE_BYTES:
        packed.unlink()
    record.facts(trace_bytes=size, trace_kept="yes" if size <= MAX_TRACE_BYTES else "no: too large")

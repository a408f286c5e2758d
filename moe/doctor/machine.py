"""Cores, memory and limits of this machine, and the speed of products and copies."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from moe.bench.processor import processor
from moe.cores import cpu_quota, usable_cores
from moe.doctor.finding import Finding
from moe.plan.machine import host_memory

FEW_FILES = 1024
LITTLE_MEMORY = 2e9  # bytes


def cores() -> list[Finding]:
    usable, threads, limit = usable_cores(), os.environ.get("OMP_NUM_THREADS"), cpu_quota()
    load = os.getloadavg()[0]
    stated = f"OMP_NUM_THREADS={threads}" if threads else "OMP_NUM_THREADS not set"
    text = f"{usable} usable cores of {_processor()}, {stated}, load {load:.1f}"
    if limit is not None:
        text += f", the container may use {limit:g}"
    if threads and threads.isdecimal() and int(threads) > usable:
        return [Finding("cores", "note", text, f"set OMP_NUM_THREADS={usable}, or leave it unset: more only wait")]
    if load > usable:
        return [Finding("cores", "note", text, "other work is running: timings will vary")]
    return [Finding("cores", "ok", text)]


def _processor() -> str:
    """The model's name, and the units that decide its speed at matrix products."""
    name, units = processor()
    return f"{name} ({', '.join(units)})" if units else name


def memory() -> list[Finding]:
    """What a process can still take, container and `ulimit -v` included; a run asks the same before it starts."""
    left = host_memory()
    if left < LITTLE_MEMORY:
        return [
            Finding(
                "memory", "note", f"{left / 1e9:.1f} GB left", "the default run (model=tiny) takes about 1 GB a rank"
            )
        ]
    return [Finding("memory", "ok", f"{left / 1e9:.1f} GB left")]


def limits() -> list[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{files} open files"
    shm = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    if shm is not None:
        text += f", /dev/shm {shm.f_bavail * shm.f_frsize / 1e9:.1f} GB free"
    if files < FEW_FILES:
        return [Finding("limits", "note", text, f"ulimit -n {FEW_FILES}")]
    return [Finding("limits", "ok", text)]


def speed() -> list[Finding]:
    """Matrix products (GFLOP/s) and copies (GB/s, read and written both counted), on the device that trains."""
    import torch

    from moe.bench.roofline import copy_rate
    from moe.train.metrics import measure_peak_flops

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(usable_cores())
    products = ", ".join(
        f"{str(dtype).removeprefix('torch.')} {measure_peak_flops(device, dtype) / 1e9:,.0f} GFLOP/s"
        for dtype in (torch.float32, torch.bfloat16)
        if device.type == "cuda" or dtype is torch.float32
    )
    return [Finding("speed", "ok", f"products on {device.type}: {products}; copies {copy_rate(device) / 1e9:.1f} GB/s")]

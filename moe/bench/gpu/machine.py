"""Versions, and the machine's speed at matrix products and copies."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess

import torch
from torch.cuda import nccl

from moe.bench.gpu.measure import copy_bandwidth, device_of, milliseconds, random
from moe.bench.gpu.record import Record
from moe.bench.gpu.settings import Settings

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "numpy", "hydra-core")
# Mixtral 8x7B with 8,192 tokens, two choices each, 2,048 rows an expert: (name, M, K, N).
SHAPES = [
    ("square", 8192, 8192, 8192),
    ("expert gate and up", 2048, 4096, 28672),
    ("expert down", 2048, 14336, 4096),
    ("attention q, k and v", 8192, 4096, 6144),
    ("head", 8192, 4096, 32000),
]
TINY_SHAPES = [("square", 64, 64, 64), ("expert gate and up", 16, 32, 224)]
COPY_BYTES = 4 << 30


def run(settings: Settings, record: Record) -> None:
    device = device_of(settings)
    record.facts(python=platform.python_version(), **{name.replace("-", "_"): _version(name) for name in PACKAGES})
    record.facts(**_device(device))
    shapes = TINY_SHAPES if settings.dry_run else SHAPES
    best = 0.0
    for name, m, k, n in shapes:
        best = max(best, _product(record, name, (m, k, n), torch.bfloat16, device))
    _, *square = shapes[0]
    for precision in ("ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = precision
        _product(record, f"float32, {precision}", tuple(square), torch.float32, device)
    bandwidth = copy_bandwidth(COPY_BYTES if not settings.dry_run else 1 << 20, device)
    record.facts(copy_GB_per_s=bandwidth / 1e9)
    name = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    record.headline(f"{name}: bf16 {best / 1e12:,.0f} TFLOP/s, copy {bandwidth / 1e12:.2f} TB/s")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device(device: torch.device) -> dict[str, str | int | None]:
    if device.type == "cpu":
        return {"device": "CPU", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        driver = f"unknown ({error})"
    return {
        "device": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": driver,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, nccl.version())),
        "cudnn": torch.backends.cudnn.version(),
    }


def _product(record: Record, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of [M, K] × [K, N] on random data, the second factor stored transposed as weights are."""
    m, k, n = shape
    a, b = random((m, k), device, dtype, 1), random((n, k), device, dtype, 2)
    time_ms = milliseconds(lambda: a @ b.T, device)
    rate = 2 * m * k * n / (time_ms / 1e3)
    record.row("matrix products", product=name, M=m, K=k, N=n, dtype=str(dtype)[6:], ms=time_ms, TFLOP_s=rate / 1e12)
    return rate

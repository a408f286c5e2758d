"""Flex attention: compile time, then the attention stage's measurements. The last stage, since compiling may hang."""

from __future__ import annotations

import time

import torch

from moe.bench.gpu import attention
from moe.bench.gpu.measure import device_of
from moe.bench.gpu.record import Record
from moe.bench.gpu.settings import Settings
from moe.config import AttentionBackend
from moe.kernels.policy import choose_products


def run(settings: Settings, record: Record) -> None:
    """On a CPU only the forward pass, not compiled: flex attention has no backward pass there."""
    device = device_of(settings)
    backward = device.type == "cuda"
    choose_products(device_of(settings))  # for the reference
    for call in ("first", "second"):  # the first one compiles
        start = time.perf_counter()
        attention.results(AttentionBackend.flex, 256, None, torch.bfloat16, device, backward=backward)
        if backward:
            torch.cuda.synchronize(device)
        record.facts(**{f"{call}_call_seconds": time.perf_counter() - start})
    attention.measure(settings, record, AttentionBackend.flex, backward=backward)

"""The machine at hand as `moe plan` takes it: its memory, a measured peak, and its GPU's stated memory bandwidth."""

from __future__ import annotations

import os

import torch

from moe.bench.gpu.measure import copy_bandwidth
from moe.config import HardwareConfig, PlanConfig
from moe.config.compose import load_config
from moe.plan import Plan, make_plan

# GPUs by torch's name, and the preset of configs/hardware that states their data sheet.
PRESETS = {
    "NVIDIA H200": "h200",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA A100-SXM4-80GB": "a100",
}
COPIED, COPIED_BY_CPU = 1 << 30, 1 << 20  # bytes


def stated(name: str) -> HardwareConfig | None:
    """The data sheet of a GPU by torch's name; None of another one."""
    if name not in PRESETS:
        return None
    return load_config([f"hardware={PRESETS[name]}"], "plan", PlanConfig).hardware


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def bandwidth(device: torch.device) -> tuple[float, str]:
    """GB a second of the device's memory, and where the number is from."""
    if (known := stated(device_name(device))) is not None:
        return known.memory_bandwidth_gbytes_per_s, f"stated, {PRESETS[device_name(device)]}"
    return copy_bandwidth(COPIED if device.type == "cuda" else COPIED_BY_CPU, device) / 1e9, "measured, a copy"


def plan_here(overrides: list[str], device: torch.device, peak: float, bandwidth_gb: float) -> Plan:
    """The plan for one rank on this machine, with `peak`, a measured FLOP/s."""
    cuda = device.type == "cuda"
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else host
    hardware = {
        "name": "here", "device": device.type, "nodes": 1, "gpus_per_node": 1, "memory_gb": memory / 1e9,
        "reserved_gb": 1.5, "host_memory_gb": host / 1e9, "peak_tflops": peak / 1e12,
        "peak_tflops_float32": peak / 1e12, "memory_bandwidth_gbytes_per_s": bandwidth_gb,
        "intra_node_gbytes_per_s": 1, "inter_node_gbytes_per_s": 1,
    }  # fmt: skip
    settings = [f"hardware.{name}={value}" for name, value in hardware.items()]
    return make_plan(load_config([*overrides, "hardware=custom", *settings, "plan.imbalance=1"], "plan", PlanConfig))

"""Checks, before anything is built, whether a run or a model fits into the memory that this machine has left.

A plan is an estimate (docs/plan.md says how good). A run is refused only when its plan needs more than `MARGIN` times
the memory left, so that no run that would fit is refused. A model's weights are known to the byte.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from moe.config import Config, DeviceKind, HardwareConfig, PlanConfig, PlanSettings
from moe.errors import UserError
from moe.plan.counts import count_parameters
from moe.plan.machine import host_memory
from moe.plan.memory import plan_memory, size
from moe.plan.run import GB, make_plan

MARGIN = 4 / 3  # plans of whole runs were up to 19 % too high
BATCH_BYTES = 20  # per token: id and label (int64), document (int32); a step's batches are all made before it
NODES = "hardware.nodes="


@dataclass(frozen=True, slots=True)
class _Here:
    """The memory left for a rank on a machine that `local_ranks` of the `world_size` ranks share: bytes of its device
    (for a CPU, of the host) and its part of the host's bytes."""

    device: DeviceKind
    world_size: int
    local_ranks: int
    device_bytes: int
    host_bytes: int


def check_run(config: Config, world_size: int, local_ranks: int, device: torch.device) -> None:
    """Raises UserError when this rank's plan needs more than `MARGIN` times the memory left for it, unless
    `check_memory=false`. Takes milliseconds."""
    if not config.check_memory:
        return
    plan = plan_memory(config, world_size, device=device.type)
    host = host_memory(local_ranks)
    there = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host
    here = _Here(DeviceKind[device.type], world_size, local_ranks, there, host)
    fullest = plan.phases[plan.peak_phase]
    batches = {"batches": BATCH_BYTES * config.train.global_batch_size * config.train.sequence_length // world_size}
    if device.type == "cuda":
        _check(config, here, f"GPU memory, phase {plan.peak_phase}", fullest, there)
        saving = {"optimizer": plan.host, "checkpoint": plan.checkpoint_host}
        _check(config, here, "host memory", batches | saving, host)
    else:
        _check(config, here, f"memory, phase {plan.peak_phase}", batches | fullest, host)


def check_model(config: Config, device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError when the model's weights alone need more than the memory that is left on `device`."""
    needed = dtype.itemsize * count_parameters(config)[0]
    there = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory()
    if needed > there:
        half = "dtype=bfloat16 halves them, " if dtype.itemsize > 2 else ""
        raise UserError(
            f"check_memory=true: the model's weights take {size(needed)}, and {size(there)} of memory are left on "
            f"{device}: {half}or take a machine with more, or check_memory=false to load it anyway"
        )


def _check(config: Config, here: _Here, where: str, kinds: dict[str, int], there: int) -> None:
    """Raises UserError when `kinds`, {purpose: bytes}, need more than `MARGIN` times `there`, the bytes left."""
    needed = sum(kinds.values())
    if needed <= MARGIN * there:
        return
    most = max(kinds, key=kinds.__getitem__)
    raise UserError(
        f"check_memory=true: {'each rank' if here.world_size > 1 else 'this run'} needs about {size(needed)} of "
        f"{where} (the most for {most}, {size(kinds[most])}), and {size(there)} are left: {_advice(config, here)}; "
        "check_memory=false starts it anyway"
    )


def _advice(config: Config, here: _Here) -> str:
    """Overrides of `moe train` with which the run would fit, as the end of a sentence."""
    hardware = HardwareConfig(
        name="here",
        device=here.device,
        nodes=max(1, here.world_size // here.local_ranks),
        gpus_per_node=here.local_ranks,
        memory_gb=max(1, here.device_bytes) / GB,
        reserved_gb=0.0,
        host_memory_gb=max(1, here.host_bytes * here.local_ranks) / GB,
        peak_tflops=1.0,
        peak_tflops_float32=1.0,
        memory_bandwidth_gbytes_per_s=1.0,
        intra_node_gbytes_per_s=1.0,
        inter_node_gbytes_per_s=1.0,
    )
    stated = {field.name: getattr(config, field.name) for field in fields(Config)}
    plan = make_plan(PlanConfig(**stated, hardware=hardware, plan=PlanSettings(imbalance=1.0)))
    if plan.fits:
        return "try a smaller train.global_batch_size"
    if not plan.advice:
        return "nothing that `moe plan` tries fits here, so take a smaller model or a larger machine"
    tried = [
        f"{override.removeprefix(NODES)} such machines" if override.startswith(NODES) else override
        for override in plan.advice
    ]
    return f"try {', '.join(tried)} (needs {size(plan.advised_gb * GB)})"

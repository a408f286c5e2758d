"""`moe bench memory`: planned memory compared with that of real training steps.

    moe bench memory                                   # three sizes, a process each (on a CPU, or the GPU at hand)
    moe bench memory model=small train.micro_batch_size=16 train.global_batch_size=16     # your own
    torchrun --nproc-per-node 2 -m moe bench memory parallel.expert_parallel_size=2    # on several ranks

Measures the peak during three optimizer steps with the engine of `moe train` on random tokens: on a CPU the process's
largest resident set (VmHWM) less the one just before the model is built, on CUDA torch's peak of allocated bytes. A
model of one tiny layer takes three steps first, so that memory used once (code of DeepSpeed and torch) is already
there and not counted.
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moe.bench.results import Cell, Results, ResultTable
from moe.bench.stepper import Stepper
from moe.config import Config
from moe.config.compose import load_config
from moe.distributed import rendezvous
from moe.distributed.mesh import Mesh
from moe.model.transformer import Transformer
from moe.plan import MemoryPlan, plan_memory

STEPS = 3  # the first creates Adam's moments; from the second on everything is allocated
TINY = [
    "model.vocab_size=512", "model.hidden_size=64", "model.intermediate_size=64", "model.num_hidden_layers=1",
    "model.num_attention_heads=2", "model.num_key_value_heads=1", "model.head_dim=null", "train.sequence_length=16",
]  # fmt: skip
# Dominated by parameters, by activations, and by both with MLP recomputation.
SIZES = {
    "weights": [
        "model=small", "model.num_hidden_layers=6", "model.hidden_size=384", "train.sequence_length=128",
        "train.micro_batch_size=2", "train.global_batch_size=4",
    ],
    "activations": [
        "model=small", "train.sequence_length=512", "train.micro_batch_size=8", "train.global_batch_size=8",
    ],
    "recomputed": [
        "model=small", "model.num_hidden_layers=6", "model.recompute=mlp", "train.sequence_length=512",
        "train.micro_batch_size=8", "train.global_batch_size=8",
    ],
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes of rank 0. `base` is the process's memory before the model is built; the other numbers don't include it."""

    base: int
    measured: int
    planned: int
    kinds: dict[str, int]

    @property
    def error(self) -> float:
        return self.planned / self.measured - 1


def run(overrides: list[str]) -> Results | None:
    """A row for each size, or for the overrides', or for this rank under torchrun. Raises UserError."""
    rank, world_size, *_ = rendezvous.world_from_environment()
    if overrides or world_size > 1:
        measured = {"yours": measure(overrides)}
    else:
        measured = {name: measure_apart(size) for name, size in SIZES.items()}
    columns = ["size", "planned, MB", "measured, MB", "error, %", "process before, MB", "planned by kind, MB"]
    table = ResultTable(columns, [_row(name, result) for name, result in measured.items()])
    furthest = max((100 * each.error for each in measured.values()), key=abs)
    return None if rank else Results([table], [], {"largest error {} %": furthest})


def measure_apart(overrides: list[str], module: str = "moe.bench.memory") -> Measured:
    """`measure` in its own process, by `module`, which prints its result: in one that did other things, they affect the
    resident set's peak, and an engine's memory isn't free before its process ends."""
    command = [sys.executable, "-m", module, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def measure(overrides: list[str], build: Callable[[Config, torch.device], Transformer] | None = None) -> Measured:
    """This rank's peak over `STEPS` optimizer steps, and the planned one. Raises UserError.

    `build` makes the model of one rank; None takes the initial weights of `moe train`.
    """
    config, tiny = load_config(overrides), load_config([*overrides, *TINY, *_tiny_tokenizer(overrides)])
    _, world_size, _, node_size = rendezvous.world_from_environment()
    config.check_world(world_size, node_size)
    mesh = rendezvous.start(config.parallel.expert_parallel_size)
    try:
        _steps(tiny, mesh)
        gc.collect()
        base = _reset(mesh.device)
        imbalance = _steps(config, mesh, None if build is None else build(config, mesh.device))
        measured = peak_bytes(mesh.device) - base
    finally:
        rendezvous.stop()
    plan = plan_memory(config, world_size, device=mesh.device.type, imbalance=imbalance)
    return Measured(base, measured, plan.step_peak, _kinds(plan))


def _tiny_tokenizer(overrides: list[str]) -> list[str]:
    """A `tokenizer.vocab_size` among the overrides must not exceed the tiny model's."""
    return (
        ["tokenizer.vocab_size=512"]
        if any(override.startswith("tokenizer.vocab_size=") for override in overrides)
        else []
    )


def _steps(config: Config, mesh: Mesh, model: Transformer | None = None) -> float:
    """Trains on random tokens; returns the rows of the rank whose experts get most, divided by the mean."""
    step, fullest = Stepper(config, mesh, model), 1.0
    for _ in range(STEPS):
        shares_LE = torch.tensor(step().metrics["expert_shares"])
        if shares_LE.numel():
            rows_LR = shares_LE.unflatten(1, (mesh.expert_parallel_size, -1)).sum(-1)
            fullest = max(fullest, float((rows_LR.amax(1) / rows_LR.mean(1)).mean()))
    return fullest


def _reset(device: torch.device) -> int:
    """Starts measuring a peak; returns the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts again from VmRSS (Linux)
    return _resident("VmRSS")


def peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}: the resident set is measured on Linux only")
    return 1024 * int(found[1])


def _kinds(plan: MemoryPlan) -> dict[str, int]:
    return {kind: size for kind, size in plan.fullest_step().items() if size}


def _row(name: str, result: Measured) -> list[Cell]:
    kinds = ", ".join(f"{kind} {size / 1e6:,.0f}" for kind, size in result.kinds.items())
    planned, measured, base = (round(size / 1e6) for size in (result.planned, result.measured, result.base))
    return [name, planned, measured, round(100 * result.error, 1), base, kinds]


if __name__ == "__main__":
    metrics = measure(sys.argv[1:])
    print(json.dumps({name: getattr(metrics, name) for name in Measured.__slots__}))

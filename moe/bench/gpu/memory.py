"""The planned memory of Mixtral 8x7B's training step at two depths, beside the peak of real steps.

The deeper one is the deepest that this GPU holds, the other has half its layers. The difference of the two is what each
further layer takes, which is most of what 8x7B needs.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from itertools import count, takewhile

import torch

from moe.bench.gpu.measure import device_of
from moe.bench.gpu.models import LOCAL, TINY, on_device
from moe.bench.gpu.record import Record
from moe.bench.gpu.settings import Settings
from moe.bench.memory import Measured, measure, measure_apart
from moe.config.compose import load_config
from moe.plan import count_parameters, plan_memory

# Two micro-batches of 8,192 tokens, as T in the layer stage.
SIZE = [
    "model=mixtral_8x7b", "tokenizer.vocab_size=300", "train.precision=bfloat16", *LOCAL, "train.sequence_length=4096",
    "train.micro_batch_size=2", "train.global_batch_size=4",
]  # fmt: skip
TINY_DEPTHS = (1, 2)
TINY_SIZE = [*TINY, "model.hidden_size=128", "model.intermediate_size=256"]  # so that the resident set grows by them
SPARE = 0.1  # share of the GPU's memory that a plan leaves free, for its error, fragments and libraries


def run(settings: Settings, record: Record) -> None:
    """Raises RuntimeError where not even two layers fit."""
    device, size = device_of(settings), [*SIZE, *(TINY_SIZE if settings.dry_run else [])]
    depths = TINY_DEPTHS if settings.dry_run else fitting(size, torch.cuda.mem_get_info(device)[0])
    found: dict[int, Measured] = {}
    for key, layers in zip(("shallow", "deep"), depths, strict=True):
        overrides = _with_layers(size, layers)
        found[layers] = measured = measure_apart(overrides, "moe.bench.gpu.memory")
        parameters, _ = count_parameters(load_config(overrides))
        _row(record, str(layers), parameters / 1e9, measured.planned, measured.measured)
        record.figure(key, abs(100 * measured.error), f"{layers} of 32 layers with gradients and optimizer state")
    fewer, more = depths
    planned, real = (getattr(found[more], name) - getattr(found[fewer], name) for name in ("planned", "measured"))
    _row(record, "each further one", None, planned / (more - fewer), real / (more - fewer))
    errors = ", ".join(f"{100 * each.error:+.1f} % at {layers}" for layers, each in found.items())
    record.headline(f"the plan's error: {errors} layers")


def fitting(size: list[str], free: int) -> tuple[int, int]:
    """Half of the deepest model whose planned step fits into `free` bytes, and the deepest. Raises RuntimeError."""
    held = takewhile(lambda layers: _planned(size, layers) <= (1 - SPARE) * free, count(1))
    deepest = max(held, default=0)
    if deepest < 2:
        raise RuntimeError(f"{free / 1e9:.0f} GB don't hold two layers: {_planned(size, 2) / 1e9:.0f} GB are planned")
    return deepest // 2, deepest


def _planned(size: list[str], layers: int) -> int:
    return plan_memory(load_config(_with_layers(size, layers)), 1, device="cuda").step_peak


def _with_layers(size: list[str], layers: int) -> list[str]:
    return [*size, f"model.num_hidden_layers={layers}"]


def _row(record: Record, layers: str, parameters: float | None, planned: float, measured: float) -> None:
    cells = {"planned_GB": planned / 1e9, "measured_GB": measured / 1e9}
    error = f"{100 * (planned / measured - 1):+.1f}" if measured > 0 else None  # a CPU's resident set may not grow
    record.row("planned and measured", layers=layers, parameters_B=parameters, **cells, **{"error, %": error})


if __name__ == "__main__":  # one depth, in a process of its own
    print(json.dumps(dataclasses.asdict(measure(sys.argv[1:], on_device))))

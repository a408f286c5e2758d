"""`moe bench kernels`: each part of a training step beside plain PyTorch, transformers' module and DeepSpeed's.

On the CPU:

    moe bench kernels                                   # the shape of `moe bench peers`: one layer, head, optimizer
    moe bench kernels precision=bfloat16 rounds=9
    moe bench kernels train.sequence_length=2048 train.micro_batch_size=1 train.global_batch_size=1

Before anything is timed, all sides' outputs and gradients must agree. Rounds alternate which side goes first; times are
medians. `% of limit` is the least possible time over the measured one: the larger of FLOPs at the speed of the fastest
product and bytes at the speed of a copy (`moe bench roofline`). `kept` is what autograd saved for the backward pass,
leaves and indices aside. `peak` is the most that one forward and backward pass allocated at a time, outputs and
gradients included, leaves aside: torch's own allocations by torch.profiler, without what MKL and oneDNN allocate
themselves. `most ÷ least` are times of rounds. The head's loss computes its gradients in the forward pass. `own
routing` is what the router chooses with its initial weights, `uniform` gives each expert the same number of rows;
`sparse layer` is all from the router to the combined output, DeepSpeed's MoE layer among its sides (set as
moe/engine/deepspeed/own_layer.py says). The exchange between ranks is in `moe bench exchange`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from moe.bench import peer_keys
from moe.bench.clock import conditions, now
from moe.bench.gpu.measure import kept_bytes, relative_error
from moe.bench.kernel_case import Case, Side
from moe.bench.kernel_cases import Cases
from moe.bench.peer import require_transformers
from moe.bench.results import Cell, Results, ResultTable
from moe.bench.roofline import CPU, copy_rate
from moe.bench.settings import DISAGREE, Rounds, counted
from moe.config import Config
from moe.kernels.policy import torch_dtype
from moe.train.metrics import measure_peak_flops

DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # largest ‖a − b‖ / ‖b‖ of outputs and gradients
GRADIENTS_SEED = 7919  # a seed of inputs would give the inputs again, for which gradients cancel
PASSES = "passes of "  # a side's, in the profile of its memory
COLUMNS = [
    "kernel", "side", "forward, ms", "backward, ms", "GFLOP/s", "GB/s", "% of limit", "kept, MB", "peak, MB",
    "× ours", "most ÷ least", "MaxVio",
]  # fmt: skip
RATIO, ROUNDS = COLUMNS.index("× ours"), COLUMNS.index("most ÷ least")


@dataclass(frozen=True, slots=True)
class Limits:
    """FLOP/s of a product and bytes a second of a copy."""

    flops: float
    bytes: float


def run(overrides: list[str]) -> Results:
    """A row for each side of each kernel. Raises UserError."""
    keys, config = parse(overrides)
    require_transformers("kernels")
    dtype = torch_dtype(config.train.precision)
    cases = Cases(config, dtype)
    peak = max(measure_peak_flops(CPU, dtype, clock=now) for _ in range(keys.rounds))
    limits = Limits(peak, copy_rate(CPU, keys.rounds))
    table, slower = ResultTable(COLUMNS, []), list[float]()
    for case in cases:
        rows = measure(case, keys.rounds, limits, DIFFERENCE[dtype])
        table.rows += rows
        slower += [float(row[RATIO] or 0) for row in rows[1:]]
        print(f"{case.name}: {rows[0][2]:.3g} ms forward", flush=True)
    limit = f"{limits.flops / 1e9:,.0f} GFLOP/s ({config.train.precision.value}), {limits.bytes / 1e9:.1f} GB/s"
    notes = [
        f"medians of {counted(keys.rounds, 'alternating round')}, {conditions()}; {steadiness(table.rows)}",
        f"limits: {limit}; outputs and gradients agree within {DIFFERENCE[dtype]:.0e}",
    ]
    return Results([table], notes, {"median of the references' time ÷ ours {}": statistics.median(slower)})


def parse(overrides: list[str]) -> tuple[Rounds, Config]:
    """`rounds=`, `precision=` and the overrides of `moe train`. Raises UserError."""
    return peer_keys.parse(overrides, Rounds(rounds=7), names=("rounds",))


def measure(case: Case, rounds: int, limits: Limits, allowed: float) -> list[list[Cell]]:
    """A row of `COLUMNS` for each side. Raises RuntimeError where the sides' results differ by more than `allowed`."""
    results = {name: once(side) for name, side in case.sides.items()}
    gradients, found = _gradients(next(iter(results.values()))), dict[str, list[Tensor]]()
    for name, side in case.sides.items():
        outputs = results[name]
        computed = torch.autograd.grad(outputs, side.leaves, gradients) if side.leaves else []
        found[name] = [*(one.detach() for one in outputs), *side.as_ours(computed)]
    ours, *others = found.values()
    for name, other in zip(list(found)[1:], others, strict=True):
        gap = relative_error(ours, other)
        if not gap <= allowed:
            raise RuntimeError(f"{case.name}: ours differs from {name} by {gap:.1e}, more than {allowed:.0e}")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in case.sides}
    for index in range(rounds + 1):
        for name in list(case.sides)[:: -1 if index % 2 else 1]:
            measured = timed(case.sides[name], gradients)
            if index:  # the first round warms up
                times[name].append(measured)
    moved = case.bytes if case.bytes is not None else _bytes(next(iter(case.sides.values())), gradients)
    least, rows = max(case.flops / limits.flops, moved / limits.bytes), list[list[Cell]]()
    first, most = [sum(each) for each in next(iter(times.values()))], peaks(case.sides, gradients)
    for name, side in case.sides.items():
        forward, backward = (statistics.median(part) for part in zip(*times[name], strict=True))
        whole = [sum(each) for each in times[name]]
        seconds = statistics.median(whole)
        ratio = statistics.median(a / b for a, b in zip(whole, first, strict=True))
        rows.append(
            [
                case.name,
                name,
                forward * 1e3,
                backward * 1e3 if side.leaves else None,
                case.flops / seconds / 1e9 if case.flops else None,
                moved / seconds / 1e9,
                100 * least / seconds,
                kept_bytes(side.forward, side.leaves) / 1e6 if side.leaves else None,
                most[name] / 1e6,
                ratio,
                max(whole) / min(whole),
                case.max_violation,
            ]
        )
    return rows


def once(side: Side) -> list[Tensor]:
    return list(side.forward())


def timed(side: Side, gradients: Sequence[Tensor]) -> tuple[float, float]:
    """Seconds of one forward and one backward pass."""
    start = now()
    outputs = side.forward()
    middle = now()
    if side.leaves:
        torch.autograd.grad(outputs, side.leaves, gradients)
    return middle - start, now() - middle


def peaks(sides: dict[str, Side], gradients: Sequence[Tensor]) -> dict[str, int]:
    """Bytes of torch's allocations at most, in a forward and a backward pass of each side, above those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for name, side in sides.items():
            with record_function(PASSES + name):
                timed(side, gradients)
    assert recorded.profiler is not None
    results: Any = recorded.profiler.kineto_results
    most, name, now_bytes = dict.fromkeys(sides, 0), "", 0
    for event in sorted(results.events(), key=lambda one: one.start_ns()):
        if event.name().startswith(PASSES):
            name, now_bytes = event.name().removeprefix(PASSES), 0
        elif event.name() == "[memory]" and name:
            now_bytes += event.nbytes()
            most[name] = max(most[name], now_bytes)
    return most


def steadiness(rows: list[list[Cell]]) -> str:
    """How many of the rows' rounds disagree."""
    busy = sum(float(row[ROUNDS] or 0) > DISAGREE for row in rows)
    warning = ": the machine is busy" if busy else ""
    return f"the rounds of {busy} of {counted(len(rows), 'side')} disagree{warning}"


def _gradients(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Random gradients of the outputs; 1 for a scalar loss."""
    generator = torch.Generator().manual_seed(GRADIENTS_SEED)
    return [
        torch.randn(one.shape, generator=generator).to(one.dtype) if one.ndim else torch.ones_like(one)
        for one in outputs
    ]


def _bytes(side: Side, outputs: Sequence[Tensor]) -> float:
    """Leaves are read in both passes and their gradients written; outputs are written and their gradients read."""
    sizes = [sum(one.numel() * one.element_size() for one in tensors) for tensors in (side.leaves, outputs)]
    return 3.0 * sizes[0] + 2.0 * sizes[1]

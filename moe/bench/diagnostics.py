"""`moe bench diagnostics`: what the diagnostics of every step cost.

    moe bench diagnostics                           8 experts top-2, then 64 experts top-8, of model=tiny
    moe bench diagnostics router.num_experts=16     your own model and router
    torchrun --nproc-per-node 2 -m moe bench diagnostics     the same on two ranks

Steps with and without them alternate on one model, and which goes first alternates too; a cost is the difference of the
medians over the pairs. On a CPU it is of the process's CPU time, which other programs on the machine disturb less than
wall-clock. Losses must be the same with and without: two models take the same steps at the end, and any difference is
an error.
"""

from __future__ import annotations

import statistics
import time

from moe.bench.clock import conditions
from moe.bench.results import Cell, Results, ResultTable
from moe.bench.settings import Rounds, split, spread
from moe.bench.stepper import Stepper
from moe.config import Config
from moe.config.compose import load_config
from moe.distributed import rendezvous
from moe.distributed.mesh import Mesh

FINE_GRAINED = ["router.num_experts=64", "router.top_k=8", "model.intermediate_size=112"]
WARM_UP_STEPS = 3
COMPARED_STEPS = 3


def run(overrides: list[str]) -> Results | None:
    """A row for each size, and what the diagnostics of the first cost; None but on rank 0. Raises UserError."""
    keys, rest = split(overrides, Rounds(rounds=40, steps=1))
    sizes = [rest] if rest else [[], FINE_GRAINED]
    configs = [load_config(size) for size in sizes]
    _, world, _, node = rendezvous.world_from_environment()
    for config in configs:
        config.check_world(world, node)
    mesh = rendezvous.start(configs[0].parallel.expert_parallel_size)
    try:
        measured = [measure(keys, config, mesh) for config in configs]
    finally:
        rendezvous.stop()
    if not mesh.is_main:
        return None
    clock = "CPU time" if mesh.device.type == "cpu" else "wall-clock"
    rows = [row for row, _ in measured]
    notes = [
        f"medians of {keys.rounds} alternating pairs, {conditions(clock, mesh.world_size)}; the costs are % of a step",
        *(f"{row[0]} experts: time with diagnostics ÷ without {spread(pairs)}" for row, pairs in measured),
    ]
    columns = ["experts", "a token", "ms/step", "cost of the diagnostics", "median of the pairs'", "MaxVio"]
    return Results([ResultTable(columns, rows)], notes, {"diagnostics cost {} % of a step": float(rows[0][3] or 0)})


def measure(keys: Rounds, config: Config, mesh: Mesh) -> tuple[list[Cell], list[float]]:
    """The table's row, and each pair's time with diagnostics ÷ without. A collective. Raises AssertionError where a
    loss depends on being watched."""
    step, violation = Stepper(config, mesh), float("nan")
    for _ in range(WARM_UP_STEPS):
        step()
    clock = time.process_time if mesh.device.type == "cpu" else time.perf_counter
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for index in range(keys.rounds):
        for diagnose in (True, False) if index % 2 else (False, True):
            mesh.barrier()
            start = clock()
            for _ in range(keys.steps):
                violation = step(diagnose=diagnose).metrics["max_violation"]
            mesh.barrier()
            seconds[diagnose].append((clock() - start) / keys.steps)
    assert _losses(config, mesh, diagnose=True) == _losses(config, mesh, diagnose=False)
    watched, plain = (statistics.median(seconds[diagnose]) for diagnose in (True, False))
    pairs = [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]
    costs = [100 * (watched / plain - 1), 100 * (statistics.median(pairs) - 1)]
    router = config.router
    return [router.num_experts, router.experts_per_token, 1000 * plain, *costs, violation], pairs


def _losses(config: Config, mesh: Mesh, *, diagnose: bool) -> list[float]:
    step = Stepper(config, mesh)
    return [step(diagnose=diagnose).metrics["loss"] for _ in range(COMPARED_STEPS)]

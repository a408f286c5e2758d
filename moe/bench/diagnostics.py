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

from moe.bench.results import Results, ResultTable
from moe.bench.settings import Rounds, split
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
        rows = [measure(keys, config, mesh) for config in configs]
    finally:
        rendezvous.stop()
    if not mesh.is_main:
        return None
    clock = "CPU time" if mesh.device.type == "cpu" else "wall-clock"
    notes = [f"{clock}, medians of {keys.rounds} pairs, {mesh.world_size} ranks; the costs are % of a step"]
    columns = ["experts", "a token", "ms/step", "cost of the diagnostics", "median of the pairs'"]
    return Results(
        [ResultTable(columns, [[*row] for row in rows])], notes, {"diagnostics cost {} % of a step": rows[0][-2]}
    )


def measure(keys: Rounds, config: Config, mesh: Mesh) -> list[float]:
    """The table's row. A collective. Raises AssertionError where a loss depends on being watched."""
    step = Stepper(config, mesh)
    for _ in range(WARM_UP_STEPS):
        step()
    clock = time.process_time if mesh.device.type == "cpu" else time.perf_counter
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for index in range(keys.rounds):
        for diagnose in (True, False) if index % 2 else (False, True):
            mesh.barrier()
            start = clock()
            for _ in range(keys.steps):
                step(diagnose=diagnose)
            mesh.barrier()
            seconds[diagnose].append((clock() - start) / keys.steps)
    assert _losses(config, mesh, diagnose=True) == _losses(config, mesh, diagnose=False)
    watched, plain = (statistics.median(seconds[diagnose]) for diagnose in (True, False))
    middle = statistics.median(a / b - 1 for a, b in zip(seconds[True], seconds[False], strict=True))
    router = config.router
    return [router.num_experts, router.experts_per_token, 1000 * plain, 100 * (watched / plain - 1), 100 * middle]


def _losses(config: Config, mesh: Mesh, *, diagnose: bool) -> list[float]:
    step = Stepper(config, mesh)
    return [step(diagnose=diagnose).metrics["loss"] for _ in range(COMPARED_STEPS)]

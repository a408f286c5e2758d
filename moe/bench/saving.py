"""`moe bench saving`: how much a checkpoint slows training down.

    moe bench saving                                    intervals of 100 steps of model=tiny, with and without a save
    torchrun --nproc-per-node 2 -m moe bench saving     the same on two ranks
    moe bench saving checkpoint.background=false        training waits for the whole save

Rounds alternate whether the interval with a save goes first. The save starts at the beginning of its interval, and the
interval ends after the save. Files go to a temporary folder of the system, which is removed; `run_dir` isn't used.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from moe.bench.clock import conditions
from moe.bench.results import Cell, Results, ResultTable
from moe.bench.settings import Rounds, split, spread
from moe.bench.stepper import Stepper
from moe.checkpoint.state import TrainState
from moe.checkpoint.writer import Saver
from moe.config import Config
from moe.config.compose import load_config, to_yaml
from moe.distributed import rendezvous
from moe.distributed.mesh import Mesh
from moe.errors import UserError

WARM_UP_STEPS = 3


def run(overrides: list[str]) -> Results | None:
    """The last line is `training waited N.NN % of an interval`; None but on rank 0. Raises UserError."""
    keys, rest = split(overrides, Rounds(rounds=5, steps=100))
    config: Config = load_config(rest)
    _, world, _, node = rendezvous.world_from_environment()
    config.check_world(world, node)
    mesh = rendezvous.start(config.parallel.expert_parallel_size)
    try:
        with tempfile.TemporaryDirectory() as folder:
            # all ranks use rank 0's folder; on several nodes it must be on a shared file system
            results = measure(keys, config, mesh, Path(mesh.from_main(folder)))
    finally:
        rendezvous.stop()
    return results if mesh.is_main else None


def measure(keys: Rounds, config: Config, mesh: Mesh, folder: Path) -> Results:
    """Times both. A collective."""
    step, told = Stepper(config, mesh), list[str]()
    saver = Saver(folder, mesh, config.checkpoint, told.append, told.append)
    for _ in range(WARM_UP_STEPS):
        step()
    waited, wall, cpu = [], [], []
    for index in range(keys.rounds):
        seconds: dict[bool, float] = {}
        busy: dict[bool, float] = {}
        for saves in (False, True) if index % 2 else (True, False):
            mesh.barrier()
            start, start_busy = time.perf_counter(), time.process_time()
            if saves:
                saver.save(step.engine, TrainState(step=index + 1), to_yaml(config))
                waited.append(time.perf_counter() - start)
            for _ in range(keys.steps):
                step()
            if not saver.wait():
                raise UserError(f"a save failed: {told[-1]}")
            mesh.barrier()
            seconds[saves], busy[saves] = time.perf_counter() - start, time.process_time() - start_busy
        waited[-1] /= seconds[False]
        wall.append(seconds[True] / seconds[False])
        cpu.append(busy[True] / busy[False])
    rows: list[list[Cell]] = [
        [name, *(100 * (value - 1) for value in (statistics.median(ratios), min(ratios), max(ratios)))]
        for name, ratios in (("wall-clock", wall), ("CPU time", cpu))
    ]
    return Results(
        [ResultTable(["an interval with a save takes more, %", "median", "least", "most"], rows)],
        [
            told[-1].replace(str(folder), "…"),
            f"{keys.rounds} alternating pairs of {keys.steps} steps, {conditions('both clocks', mesh.world_size)}; "
            f"saves {'in the background' if config.checkpoint.background else 'in the foreground'}, hashing and fsync "
            f"included; wall-clock with ÷ without a save {spread(wall)}",
        ],
        {"training waited {} % of an interval": 100 * statistics.median(waited)},
    )

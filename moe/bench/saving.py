"""`moe bench saving`: what a checkpoint costs the training beside it.

    moe bench saving                                    intervals of 100 steps of model=tiny, with and without a save
    torchrun --nproc-per-node 2 -m moe bench saving     the same on two ranks
    moe bench saving checkpoint.background=false        the whole save while training waits

Intervals alternate which goes first. A save begins an interval and ends inside it; its files go to a temporary folder
in `run_dir`'s place (default: the system's), which is removed.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from moe.bench.settings import Rounds, split
from moe.bench.stepper import Stepper
from moe.compose import load_config, to_yaml
from moe.config import Config
from moe.dist import topology as topology_module
from moe.dist.checkpoint import TrainState
from moe.dist.save import Saver
from moe.dist.topology import Topology

WARM_UP_STEPS = 3


def run(words: list[str]) -> None:
    """Prints on rank 0; the last line is `training waited N.NN % of an interval`. Raises ValueError for the user."""
    keys, rest = split(words, Rounds(rounds=5, steps=100))
    config: Config = load_config(rest)
    _, world, _, node = topology_module.world_from_environment()
    config.check_world(world, node)
    topology = topology_module.start(config.parallel.expert)
    try:
        with tempfile.TemporaryDirectory() as folder:
            # Rank 0's: ranks on several nodes need one that they share.
            lines = measure(keys, config, topology, Path(topology.from_main(folder)))
    finally:
        topology_module.stop()
    if topology.is_main:
        print("\n".join(lines))


def measure(keys: Rounds, config: Config, topology: Topology, folder: Path) -> list[str]:
    """Lines to print. A collective."""
    step, told = Stepper(config, topology), list[str]()
    saver = Saver(folder, topology, config.checkpoint, told.append, told.append)
    for _ in range(WARM_UP_STEPS):
        step()
    waited, wall, cpu = [], [], []
    for index in range(keys.rounds):
        seconds: dict[bool, float] = {}
        busy: dict[bool, float] = {}
        for saves in (False, True) if index % 2 else (True, False):
            topology.barrier()
            start, start_busy = time.perf_counter(), time.process_time()
            if saves:
                saver.save(step.engine, TrainState(step=index + 1), to_yaml(config))
                waited.append(time.perf_counter() - start)
            for _ in range(keys.steps):
                step()
            if not saver.wait():
                raise ValueError(f"a save failed: {told[-1]}")
            topology.barrier()
            seconds[saves], busy[saves] = time.perf_counter() - start, time.process_time() - start_busy
        waited[-1] /= seconds[False]
        wall.append(seconds[True] / seconds[False])
        cpu.append(busy[True] / busy[False])
    return [
        told[-1],
        f"medians of {keys.rounds} alternating pairs of {keys.steps} steps, {topology.world_size} ranks, "
        f"{'in the background' if config.checkpoint.background else 'in the foreground'}",
        f"an interval with a save takes {100 * (statistics.median(wall) - 1):+.1f} % ({_range(wall)}) of wall-clock "
        f"and {100 * (statistics.median(cpu) - 1):+.1f} % ({_range(cpu)}) of CPU time more, hashing and fsync included",
        f"training waited {100 * statistics.median(waited):.2f} % of an interval",
    ]


def _range(ratios: list[float]) -> str:
    return f"{100 * (min(ratios) - 1):+.1f} to {100 * (max(ratios) - 1):+.1f}"

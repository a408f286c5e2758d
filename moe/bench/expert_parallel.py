"""`torchrun --nproc-per-node N -m moe bench expert_parallel`: experts split over ranks beside plain data parallelism.

    torchrun --nproc-per-node 2 -m moe bench expert_parallel
    torchrun --nproc-per-node 2 -m moe bench expert_parallel model=tiny rounds=5 steps=4

Both train the same model on the same global batch in the same processes. Rounds alternate which goes first, and the
ratio is computed within each round. `parallel.expert_parallel_size` defaults to the number of ranks.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

from moe.bench.clock import conditions
from moe.bench.results import Results, ResultTable
from moe.bench.settings import Rounds, counted, split, spread
from moe.bench.stepper import Stepper
from moe.config import Config, Mlp
from moe.config.compose import load_config
from moe.distributed import rendezvous
from moe.distributed.mesh import Mesh
from moe.errors import UserError

DEFAULTS = ["model=small", "train.sequence_length=512", "train.micro_batch_size=2"]
WARM_UP_STEPS = 2


def run(overrides: list[str]) -> Results | None:
    """Both speeds; the last line is `ratio tokens/s N.NN`. None but on rank 0. Raises UserError."""
    _, world, _, node = rendezvous.world_from_environment()
    if world == 1:
        raise UserError("bench expert_parallel needs ranks: torchrun --nproc-per-node 2 -m moe bench …")
    keys, rest = split(overrides)
    batch = [f"parallel.expert_parallel_size={world}", f"train.global_batch_size={2 * world}"]
    config: Config = load_config([*DEFAULTS, *batch, *rest])
    config.check_world(world, node)
    if config.model.mlp is not Mlp.sparse or config.parallel.expert_parallel_size == 1:
        raise UserError(
            f"parallel.expert_parallel_size={config.parallel.expert_parallel_size} must be ≥ 2, and model.mlp sparse"
        )
    mesh = rendezvous.start(config.parallel.expert_parallel_size)
    try:
        results = compare(keys, config, mesh)
    finally:
        rendezvous.stop()
    return results if mesh.is_main else None


def compare(keys: Rounds, config: Config, mesh: Mesh) -> Results:
    """Times both. A collective."""
    plain = replace(mesh, expert_parallel_size=1)
    whole = replace(config, parallel=replace(config.parallel, expert_parallel_size=1))
    sides = {"data parallel": Stepper(whole, plain), f"expert={mesh.expert_parallel_size}": Stepper(config, mesh)}
    tokens = keys.steps * config.train.global_batch_size * config.train.sequence_length
    for step in sides.values():
        for _ in range(WARM_UP_STEPS):
            step()
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    violations = dict[str, float]()  # of each side's last step
    for index in range(keys.rounds):
        for name in sorted(sides, reverse=bool(index % 2)):
            mesh.barrier()
            start = time.perf_counter()
            for _ in range(keys.steps):
                violations[name] = sides[name]().metrics["max_violation"]
            mesh.barrier()
            speeds[name].append(tokens / (time.perf_counter() - start))
    before, after = speeds.values()
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    return Results(
        [
            ResultTable(
                ["", "tokens/s", "MaxVio"],
                [[name, statistics.median(values), violations[name]] for name, values in speeds.items()],
            )
        ],
        [
            f"medians of {counted(keys.rounds, 'alternating round')}, {conditions('wall-clock', mesh.world_size)}; "
            f"ratio per round {spread(ratios)}"
        ],
        {"ratio tokens/s {}": statistics.median(ratios)},
    )

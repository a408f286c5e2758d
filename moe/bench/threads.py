"""`moe bench threads`: our training step on all of this process's cores beside one, in one process.

    moe bench threads                                  # the step of `moe bench peers`
    moe bench threads precision=bfloat16 rounds=9
    moe bench threads threads=4 model=tiny             # any key of `moe train`

One model takes steps with one thread and with `threads` (0: as many as this process's physical cores), in rounds that
alternate which goes first; the ratio is computed within each round. A large matrix product is measured beside each: no
step can gain more from threads than its products do. Times are wall-clock.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import torch

from moe.bench.peer_keys import DEFAULTS
from moe.bench.results import Cell, Results, ResultTable
from moe.bench.settings import Rounds, counted, load, split, spread
from moe.bench.stepper import Stepper
from moe.config import Config
from moe.config.compose import load_config
from moe.cores import usable_cores
from moe.distributed import rendezvous
from moe.distributed.mesh import Mesh
from moe.errors import UserError
from moe.kernels.policy import torch_dtype
from moe.plan import flops_per_token
from moe.train.metrics import measure_peak_flops

WARM_UP_STEPS = 2
OWN = "threads="


@dataclass(slots=True)
class ThreadTimes:
    """Of each round, with one number of threads: tokens per second of the step and FLOP/s of a product. MaxVio is the
    last step's, None in a dense model."""

    speeds: list[float] = field(default_factory=list)
    products: list[float] = field(default_factory=list)
    max_violation: float | None = None


def run(overrides: list[str]) -> Results:
    """A row for each number of threads; the last line is `ratio tokens/s N.NN`. Raises UserError."""
    keys, threads, config = parse(overrides)
    if rendezvous.world_from_environment()[1] != 1:
        raise UserError("bench threads measures one process: start it without torchrun")
    cores = usable_cores()
    if cores == 1:
        raise UserError("bench threads needs at least 2 cores: this process may use only 1")
    threads = threads or cores
    if not 2 <= threads <= cores:
        raise UserError(f"threads={threads} must be 0 or from 2 to {cores}, the cores that this process may use")
    mesh = rendezvous.start(1)
    before = torch.get_num_threads()
    try:
        if mesh.device.type != "cpu":
            raise UserError("bench threads measures a CPU")
        times = measure(keys, config, mesh, (1, threads))
    finally:
        torch.set_num_threads(before)
        rendezvous.stop()
    return results(config, times)


def parse(overrides: list[str]) -> tuple[Rounds, int, Config]:
    """`rounds=` and `steps=`, `threads=` (0 unless stated), and `precision=` (train.precision) with the overrides of
    `moe train`. Raises UserError."""
    keys, rest = split([one for one in overrides if not one.startswith(OWN)])
    stated = [one.removeprefix(OWN) for one in overrides if one.startswith(OWN)]
    if stated and not stated[-1].isdecimal():
        raise UserError(f"{OWN}{stated[-1]} must be a whole number")
    config: Config = load_config(
        [*DEFAULTS, *(f"train.{one}" if one.startswith("precision=") else one for one in rest)]
    )
    config.check_world(1)
    return keys, int(stated[-1]) if stated else 0, config


def measure(keys: Rounds, config: Config, mesh: Mesh, counts: tuple[int, int]) -> dict[int, ThreadTimes]:
    """{number of threads: its times}, both over the same rounds. Leaves torch with either number of threads."""
    step, dtype = Stepper(config, mesh), torch_dtype(config.train.precision)
    tokens = keys.steps * config.train.global_batch_size * config.train.sequence_length
    times = {count: ThreadTimes() for count in counts}
    for count in counts:
        torch.set_num_threads(count)
        for _ in range(WARM_UP_STEPS):
            step()
    for index in range(keys.rounds):
        for count in counts[:: -1 if index % 2 else 1]:
            torch.set_num_threads(count)
            here, start = times[count], time.perf_counter()
            for _ in range(keys.steps):
                here.max_violation = step().metrics["max_violation"]
            here.speeds.append(tokens / (time.perf_counter() - start))
            here.products.append(measure_peak_flops(mesh.device, dtype))
    return times


def results(config: Config, times: dict[int, ThreadTimes]) -> Results:
    """`times` as `measure` returns them, one thread first."""
    flops, step_tokens = flops_per_token(config), config.train.global_batch_size * config.train.sequence_length
    rows: list[list[Cell]] = []
    for count, here in times.items():
        speed, product = statistics.median(here.speeds), statistics.median(here.products)
        share = statistics.median(a * flops / b for a, b in zip(here.speeds, here.products, strict=True))
        row: list[Cell] = [counted(count, "thread"), speed, step_tokens / speed * 1e3, speed * flops / 1e9]
        rows.append([*row, product / 1e9, 100 * share, here.max_violation])
    one, many = times.values()
    steps = [b / a for a, b in zip(one.speeds, many.speeds, strict=True)]
    products = [b / a for a, b in zip(one.products, many.products, strict=True)]
    columns = ["", "tokens/s", "ms/step", "GFLOP/s", "a product's GFLOP/s", "% of product", "MaxVio"]
    return Results(
        [ResultTable(columns, rows)],
        [
            f"medians of {counted(len(steps), 'alternating round')} in {config.train.precision.value}, wall-clock, "
            f"{load()}",
            f"{max(times)} threads ÷ 1, per round: step {spread(steps)}",
            f"{max(times)} threads ÷ 1, per round: product {spread(products)}",
        ],
        {"ratio of a product {}": statistics.median(products), "ratio tokens/s {}": statistics.median(steps)},
    )

"""`moe bench scale`: does a training step's cost grow as its formula says?

    moe bench scale                                    # of model=tiny: sequence length, experts, tokens
    moe bench scale rounds=5 steps=2 model.hidden_size=256
    torchrun --nproc-per-node 2 -m moe bench scale     # ranks and expert-parallel size: moe/bench/scale_ranks.py
    sudo RATE=100mbit bash launch/two_namespaces.sh bench scale rate=100mbit parallel.expert_across_nodes=true
                                                       # and what a link of that rate costs: moe/bench/link.py

Each series doubles one size: the sequence length, full and with a window of 128, at 4,096 tokens a step; the number of
experts at fixed top-k; the tokens of a step. The formula is `moe.plan.flops_per_token`. Rounds take the sizes of a
series one after another, in alternating order. The exponents are those of power laws fitted to medians: time per token
∝ size^a, the formula ∝ size^b; a − b is what the formula doesn't tell: 0 where cost grows as it says, below 0 where
small sizes have costs of their own, above 0 where large ones do (more experts: fewer rows each, more weights to
update).
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from moe.bench.clock import conditions, now
from moe.bench.link import parse_rate
from moe.bench.results import Cell, Results, ResultTable
from moe.bench.scale_ranks import compare_ranks, expert_parallel_sizes
from moe.bench.settings import Rounds, counted, exponent, least_steady, split
from moe.bench.stepper import Stepper
from moe.config import Config
from moe.config.compose import load_config
from moe.distributed import rendezvous
from moe.distributed.mesh import Mesh
from moe.errors import UserError
from moe.plan import flops_per_token

TOKENS, LENGTHS, WINDOW = 4096, (256, 512, 1024, 2048, 4096), 128
DEFAULTS = ["model=tiny"]


@dataclass(frozen=True, slots=True)
class Growth:
    """{size: the overrides that set it}."""

    name: str
    sizes: dict[int, list[str]]


@dataclass(slots=True)
class StepTimes:
    """Seconds per token of each round, and the last step's MaxVio (None: a dense model)."""

    seconds: list[float] = field(default_factory=list)
    max_violation: float | None = None


def _batch(sequences: int, length: int) -> list[str]:
    sizes = {"micro_batch_size": sequences, "global_batch_size": sequences, "sequence_length": length}
    return [f"train.{name}={size}" for name, size in sizes.items()]


def series() -> list[Growth]:
    lengths = {length: _batch(TOKENS // length, length) for length in LENGTHS}
    full, banded = (
        {length: [*keys, f"model.sliding_window={window}"] for length, keys in lengths.items()}
        for window in ("null", WINDOW)
    )
    return [
        Growth("sequence length, all keys seen", full),
        Growth(f"sequence length, window {WINDOW}", banded),
        Growth("experts, fixed top-k", {n: [*_batch(8, 512), f"router.num_experts={n}"] for n in (4, 8, 16, 32)}),
        Growth("tokens a step", {512 * n: _batch(n, 512) for n in (1, 2, 4, 8)}),
    ]


def run(overrides: list[str]) -> Results | None:
    """A row for each size and a row of exponents for each series; with several ranks a row for each expert-parallel
    size, None but on rank 0. Raises UserError."""
    keys, rate, rest = parse(overrides)
    _, world, _, node = rendezvous.world_from_environment()
    if world == 1:
        if rate is not None:
            raise UserError("bench scale rate= is of a link between ranks: start it with torchrun")
        return _one_process(keys, rest)
    configs = expert_parallel_sizes([*DEFAULTS, *rest], world, node)
    mesh = rendezvous.start(1)
    try:
        results = compare_ranks(configs, keys, mesh, rate)
    finally:
        rendezvous.stop()
    return results if mesh.is_main else None


def _one_process(keys: Rounds, rest: list[str]) -> Results:
    sizes = ResultTable(["series", "size", "µs/token", "MFLOP/token", "GFLOP/s", "MaxVio"], [])
    exponents = ResultTable(["series", "time", "formula", "difference"], [])
    rounds: dict[str, list[float]] = {}
    mesh = rendezvous.start(1)
    try:
        if mesh.device.type != "cpu":
            raise UserError("bench scale measures a CPU")
        for each in series():
            configs = {size: load_config([*DEFAULTS, *own, *rest]) for size, own in each.sizes.items()}
            measured, flops = measure(configs, keys, mesh), {n: flops_per_token(one) for n, one in configs.items()}
            seconds = {n: statistics.median(one.seconds) for n, one in measured.items()}
            for n, one in measured.items():
                rates: list[Cell] = [seconds[n] * 1e6, flops[n] / 1e6, flops[n] / seconds[n] / 1e9]
                sizes.rows.append([each.name, n, *rates, one.max_violation])
                rounds[f"{each.name}: {n}"] = one.seconds
            found, said = exponent(seconds), exponent(flops)
            exponents.rows.append([each.name, round(found, 3), round(said, 3), round(found - said, 3)])
            print(f"{each.name}: time per token ∝ size^{found:.2f}, the formula ∝ size^{said:.2f}", flush=True)
    finally:
        rendezvous.stop()
    notes = [
        f"medians of {counted(keys.rounds, 'alternating round')} of {counted(keys.steps, 'step')}, {conditions()}",
        least_steady(rounds),
    ]
    largest = max((float(row[3] or 0) for row in exponents.rows), key=abs)
    return Results([sizes, exponents], notes, {"largest difference of exponents {}": largest})


def parse(overrides: list[str]) -> tuple[Rounds, float | None, list[str]]:
    """`rounds=` and `steps=`, the bytes per second of `rate=` and the checked overrides of `moe train`, none of which
    is the size of a series. Raises UserError."""
    keys, rest = split(overrides, Rounds(rounds=3, steps=1))
    rates = [parse_rate(one.partition("=")[2]) for one in rest if one.startswith("rate=")]
    rest = [one for one in rest if not one.startswith("rate=")]
    taken = {one.partition("=")[0] for each in series() for own in each.sizes.values() for one in own}
    taken.add("parallel.expert_parallel_size")
    for override in rest:
        if override.partition("=")[0] in taken:
            raise UserError(f"bench scale {override}: it sets {', '.join(sorted(taken))} itself")
    load_config([*DEFAULTS, *rest])
    return keys, rates[-1] if rates else None, rest


def measure(configs: dict[int, Config], keys: Rounds, mesh: Mesh) -> dict[int, StepTimes]:
    """Of each size's step."""
    steps = {size: Stepper(config, mesh) for size, config in configs.items()}
    times = {size: StepTimes() for size in configs}
    for index in range(keys.rounds + 1):
        for size in list(steps)[:: -1 if index % 2 else 1]:
            train = configs[size].train
            start = now()
            for _ in range(keys.steps):
                times[size].max_violation = steps[size]().metrics["max_violation"]
            spent = (now() - start) / (keys.steps * train.global_batch_size * train.sequence_length)
            if index:  # the first round warms up
                times[size].seconds.append(spent)
    return times

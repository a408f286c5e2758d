"""`moe bench scale` under torchrun: a step's cost on N ranks, for each expert-parallel size that divides them.

Every rank takes the same number of tokens a step, so its FLOPs are the formula's in each row. In the first row each
rank trains a model of its own and sends nothing: what the other rows take beyond it is the cost of having ranks. Bytes
of the exchange are those that leave a rank: counted in the all-to-all calls of one step, and planned
(`moe.plan.exchange_bytes`: of n ranks, (n − 1) / n of a rank's rows go to others). Gradients and weights, planned too,
are what DeepSpeed reduces and gathers.

With the link's `rate` a second table has the laws of its collectives (moe/bench/link.py), and the first one more
columns: a step's milliseconds beyond the rank alone; those of its planned bytes at the stated rate, which is the lower
bound of `moe plan`; and those by the laws.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.bench.clock import conditions
from moe.bench.link import LinkLaws, measure_calls
from moe.bench.results import Cell, Results, ResultTable
from moe.bench.settings import Rounds, counted, exponent, least_steady
from moe.bench.stepper import Stepper
from moe.config import Config, EngineKind
from moe.config.compose import load_config
from moe.distributed.mesh import Mesh
from moe.plan import exchange_bytes, flops_per_token, plan_traffic

SEQUENCES, LENGTH = 8, 512  # of a rank's step
COLUMNS = [
    "ranks", "expert-parallel size", "µs/token of a rank", "MFLOP/token", "time ÷ alone", "exchange, MB a step",
    "counted ÷ planned", "gradients and weights, MB a step", "MaxVio",
]  # fmt: skip
LINK_COLUMNS = ["ms beyond alone", "ms at the stated rate", "ms by the law", "law ÷ measured"]


def expert_parallel_sizes(overrides: list[str], world_size: int, node_size: int) -> dict[int, Config]:
    """{expert-parallel size: configuration} for each that divides the ranks and the experts, and the ranks of a node
    unless `parallel.expert_across_nodes` allows others. Raises UserError."""
    batch = {"micro_batch_size": SEQUENCES, "global_batch_size": SEQUENCES * world_size, "sequence_length": LENGTH}
    config: Config = load_config([*overrides, *(f"train.{name}={value}" for name, value in batch.items())])
    config.check_world(world_size, node_size)
    ranks = world_size if config.parallel.expert_across_nodes else node_size
    shared = math.gcd(world_size, ranks, config.router.num_experts)
    divisors = [n for n in range(1, shared + 1) if shared % n == 0]
    return {n: replace(config, parallel=replace(config.parallel, expert_parallel_size=n)) for n in divisors}


def compare_ranks(configs: dict[int, Config], keys: Rounds, mesh: Mesh, rate: float | None = None) -> Results:
    """A row for a rank alone and one for each size. `rate` is the link's, in bytes per second. A collective."""
    calls = None if rate is None else measure_calls(keys.rounds, mesh)
    plain = configs[1]
    train = replace(plain.train, global_batch_size=plain.train.micro_batch_size)
    alone = Stepper(replace(plain, engine=EngineKind.plain, train=train), Mesh(0, 1, 0, 1, 1, mesh.device))
    steps = {0: alone} | {n: Stepper(one, replace(mesh, expert_parallel_size=n)) for n, one in configs.items()}
    sent = {n: _leaving(step, mesh) for n, step in steps.items()}
    times, violations = _measure(steps, keys, mesh)
    seconds = {n: statistics.median(each) for n, each in times.items()}
    rows: list[list[Cell]] = [_row(0, plain, seconds, violations)]
    ratios = list[float]()
    for n, config in configs.items():
        row = _row(n, config, seconds, violations)
        exchange = exchange_bytes(config, mesh.world_size)
        if n > 1:
            planned = exchange.total * exchange.leaving
            ratios.append(sent[n] / planned)
            row[5:7] = [sent[n] / 1e6, ratios[-1]]
        flows = plan_traffic(config, 1, mesh.world_size)
        row[7] = sum(flow.total for name, flow in flows.items() if name != "expert exchange") / 1e6
        row[0] = mesh.world_size
        rows.append(row)
    notes = [
        f"medians of {counted(keys.rounds, 'round')} of {counted(keys.steps, 'step')}, "
        f"{conditions('wall-clock', mesh.world_size)}",
        least_steady({f"expert-parallel size {n}" if n else "one rank alone": each for n, each in times.items()}),
    ]
    figures = {f"{mesh.world_size} ranks' time ÷ one's alone {{}}": seconds[1] / seconds[0]}
    if len(configs) > 1:
        grown = exponent({n: seconds[n] for n in configs})
        notes.append(
            f"time per token ∝ (expert-parallel size)^{grown:.2f}, the formula's FLOPs of a rank ∝ its power 0"
        )
        figures["exponent of time over expert-parallel size {}"] = grown
        figures["exchanged bytes, counted ÷ planned {}"] = max(ratios, key=lambda ratio: abs(ratio - 1))
    results = Results([ResultTable(COLUMNS, rows)], notes, figures)
    if rate is not None and calls is not None:
        _add_law(results, configs, seconds, calls, rate, mesh.world_size)
    return results


def _add_law(
    results: Results,
    configs: dict[int, Config],
    seconds: dict[int, float],
    calls: dict[str, dict[int, list[float]]],
    rate: float,
    world_size: int,
) -> None:
    """The laws of the link's collectives, and what they say of each row but the first. `seconds` are of a token."""
    laws, table = LinkLaws(calls), results.tables[0]
    table.columns = [*table.columns, *LINK_COLUMNS]
    table.rows[0] += [None] * len(LINK_COLUMNS)
    ratios = dict[int, float]()
    for row, (n, config) in zip(table.rows[1:], configs.items(), strict=True):
        beyond = (seconds[n] - seconds[0]) * SEQUENCES * LENGTH
        sent = sum(flow.total for flow in plan_traffic(config, 1, world_size).values())
        said = laws.planned_seconds(config, world_size)
        if beyond > 0:  # it may not be where the machine is busy and the link fast
            ratios[n] = said / beyond
        row += [beyond * 1e3, sent / rate * 1e3, said * 1e3, ratios.get(n)]
    results.tables.append(laws.table())
    steady = {f"{name} of {size:,} bytes": each for name, of in calls.items() for size, each in of.items()}
    results.notes += [*laws.notes(rate), least_steady(steady)]
    results.figures["all-reduce's bandwidth ÷ the link's rate {}"] = laws.all_reduce.bandwidth / rate
    results.figures["all-to-all's bandwidth ÷ the link's rate {}"] = laws.all_to_all.bandwidth / rate
    for n, ratio in ratios.items():
        results.figures[f"time beyond one rank's alone at expert-parallel size {n}, law ÷ measured {{}}"] = ratio


def _row(n: int, config: Config, seconds: dict[int, float], violations: dict[int, float]) -> list[Cell]:
    measured: list[Cell] = [seconds[n] * 1e6, flops_per_token(config) / 1e6, seconds[n] / seconds[0]]
    return [1, max(n, 1), *measured, None, None, None, violations[n]]


def _measure(steps: dict[int, Stepper], keys: Rounds, mesh: Mesh) -> tuple[dict[int, list[float]], dict[int, float]]:
    """Each round's seconds per token of a rank, and MaxVio of the last step. A collective."""
    times: dict[int, list[float]] = {n: [] for n in steps}
    violations: dict[int, float] = {}
    for index in range(keys.rounds + 1):
        for n in list(steps)[:: -1 if index % 2 else 1]:
            mesh.barrier()
            start = time.perf_counter()
            for _ in range(keys.steps):
                violations[n] = steps[n]().metrics["max_violation"]
            mesh.barrier()
            if index:  # the first round warms up
                train = steps[n].config.train
                tokens = keys.steps * train.micro_batch_size * train.sequence_length
                times[n].append((time.perf_counter() - start) / tokens)
    return times, violations


def _leaving(step: Stepper, mesh: Mesh) -> float:
    """Bytes that one step's all-to-all calls send to other ranks, the mean over ranks. A collective."""
    with _counted_exchange() as sent:
        step()
    return float(mesh.sum_(torch.tensor(sent, dtype=torch.float64))) / mesh.world_size


@contextmanager
def _counted_exchange() -> Iterator[list[float]]:
    """Adds the bytes that leave this rank in calls of `torch.distributed.all_to_all_single` to the one number that it
    yields."""
    sent, real = [0.0], dist.all_to_all_single

    def counting(output: Tensor, given: Tensor, into: Any = None, out_of: Any = None, **keywords: Any) -> Any:
        group = keywords["group"]
        own = 1 / dist.get_world_size(group) if out_of is None else out_of[dist.get_rank(group)] / max(sum(out_of), 1)
        sent[0] += given.nbytes * (1 - own)
        return real(output, given, into, out_of, **keywords)

    dist.all_to_all_single = counting
    try:
        yield sent
    finally:
        dist.all_to_all_single = real

"""`torchrun --nproc-per-node N -m moe bench exchange`: a sparse layer's exchange beside plain all-to-alls of its bytes.

    torchrun --nproc-per-node 2 -m moe bench exchange                        # the shape of `moe bench expert_parallel`
    torchrun --nproc-per-node 2 -m moe bench exchange precision=bfloat16 rounds=9

Forward and backward pass of one sparse layer without its experts: counts, rows to the experts' ranks, their order by
expert, and back (`moe.sparse.dispatch`). The other side knows the counts and calls `all_to_all_single` for the same
rows, twice forward and twice backward: what is above its time is the counts' exchange, the host's wait for it, and the
sorting. Both must return every row and gradient to where it came from, bit for bit, before anything is timed. `own
routing` is what the router chooses with its initial weights, `uniform routing` gives each expert as many rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from moe.bench import expert_parallel
from moe.bench.clock import conditions
from moe.bench.results import Cell, Results, ResultTable
from moe.bench.settings import Rounds, counted, split, spread
from moe.config import Config, Mlp
from moe.config.compose import load_config
from moe.distributed import rendezvous
from moe.distributed.mesh import Mesh
from moe.engine import prepare
from moe.errors import UserError
from moe.kernels.policy import torch_dtype
from moe.model.build import build_model
from moe.sparse import routers_of
from moe.sparse.balance import max_violation
from moe.sparse.dispatch import by_expert, from_experts, plan_exchange, send_counts, to_experts
from moe.sparse.routers.base import Choices, count_choices

WARM_UP_PASSES = 2
OURS, PLAIN = "ours", "all_to_all_single"

Pass = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # rows and gradients [N, H] → what came back of both


def run(overrides: list[str]) -> Results | None:
    """A row for each side and routing; the last line is `all_to_all_single's time ÷ ours N.NN`, of the router's own
    choices. None but on rank 0. Raises UserError."""
    _, world, _, node = rendezvous.world_from_environment()
    keys, config = parse(overrides, world)
    if world == 1:
        raise UserError("bench exchange needs ranks: torchrun --nproc-per-node 2 -m moe bench …")
    config.check_world(world, node)
    mesh = rendezvous.start(world)
    try:
        results = compare(keys, config, prepare(config, mesh))
    finally:
        rendezvous.stop()
    return results if mesh.is_main else None


def parse(overrides: list[str], world: int = 1) -> tuple[Rounds, Config]:
    """`rounds=`, `steps=` (passes), `precision=` and the overrides of `moe train`, whose experts are split over all of
    `world` ranks. Raises UserError."""
    keys, rest = split(overrides, Rounds(rounds=7, steps=10))
    rest = [f"train.{one}" if one.startswith("precision=") else one for one in rest]
    size = [f"parallel.expert_parallel_size={world}", f"train.global_batch_size={2 * world}"]
    config: Config = load_config([*expert_parallel.DEFAULTS, *size, *rest])
    if config.parallel.expert_parallel_size != world or config.model.mlp is not Mlp.sparse:
        raise UserError(
            f"parallel.expert_parallel_size={config.parallel.expert_parallel_size} must be the number of ranks, "
            f"{world}, and model.mlp sparse"
        )
    return keys, config


def compare(keys: Rounds, config: Config, mesh: Mesh) -> Results:
    """Times both sides with both routings. A collective."""
    rows: list[list[Cell]] = []
    notes = [
        f"medians of {counted(keys.rounds, 'alternating round')}, each the mean of {keys.steps} passes over "
        f"{config.train.micro_batch_size * config.train.sequence_length:,} tokens a rank in "
        f"{config.train.precision.value}, {conditions('wall-clock', mesh.world_size)}"
    ]
    ratios: dict[str, list[float]] = {}
    for routing, choices in routings(config, mesh).items():
        counts_E = count_choices(choices.experts_N, config.router.num_experts)
        generator = torch.Generator().manual_seed(mesh.rank)
        shape, dtype = (len(choices.experts_N), config.model.hidden_size), torch_dtype(config.train.precision)
        rows_NH, grads_NH = (torch.randn(shape, generator=generator).to(mesh.device, dtype) for _ in range(2))
        sides = {OURS: ours(counts_E, mesh), PLAIN: plain(counts_E, mesh)}
        for name, side in sides.items():
            for _ in range(WARM_UP_PASSES):
                returned = side(rows_NH, grads_NH)
            if not all(map(torch.equal, returned, (rows_NH, grads_NH))):
                raise RuntimeError(f"{name}, {routing}: rows or gradients came back changed")
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for index in range(keys.rounds):
            for name in list(sides)[:: -1 if index % 2 else 1]:
                mesh.barrier()
                start = time.perf_counter()
                for _ in range(keys.steps):
                    sides[name](rows_NH, grads_NH)
                mesh.barrier()
                seconds[name].append((time.perf_counter() - start) / keys.steps)
        away = int(counts_E.sum() - counts_E.view(mesh.world_size, -1)[mesh.rank].sum())
        moved = float(mesh.sum_(torch.tensor(4.0 * away, dtype=torch.float64, device=mesh.device)))
        moved *= config.model.hidden_size * rows_NH.element_size() / mesh.world_size
        violation = float(max_violation(mesh.sum_(counts_E.clone())))
        ratios[routing] = [b / a for a, b in zip(seconds[OURS], seconds[PLAIN], strict=True)]
        notes.append(f"{routing}: {PLAIN}'s time ÷ ours, per round: {spread(ratios[routing])}")
        for name, each in seconds.items():
            middle = statistics.median(each)
            rows.append([f"{name}, {routing}", middle * 1e3, moved / 1e6, moved / middle / 1e9, violation])
    figures = {f"{routing}: {PLAIN}'s time ÷ ours {{}}": statistics.median(each) for routing, each in ratios.items()}
    columns = ["", "ms forward and backward", "MB a rank to others", "GB/s", "MaxVio"]
    return Results([ResultTable(columns, rows)], notes, figures)


def routings(config: Config, mesh: Mesh) -> dict[str, Choices]:
    """This rank's choices: each expert as many rows (of top-k, as nearly as can be), and those of a layer's router."""
    train, router = config.train, next(iter(routers_of(build_model(config, mesh.device, mesh.expert_group))))
    generator = torch.Generator().manual_seed(train.seed + mesh.rank)
    shape = (train.micro_batch_size, train.sequence_length, config.model.hidden_size)
    with torch.no_grad():
        own = router(torch.randn(shape, generator=generator).to(mesh.device)).choices
    tokens, top_k = shape[0] * shape[1], config.router.experts_per_token
    even_TK = torch.arange(tokens * top_k, device=mesh.device).view(tokens, top_k) % config.router.num_experts
    even = Choices.top_k(even_TK, torch.full(even_TK.shape, 1 / top_k, device=mesh.device))
    return {"uniform routing": even, "own routing": own}


def ours(counts_E: Tensor, mesh: Mesh) -> Pass:
    group = mesh.expert_group
    assert group is not None

    def exchanged(rows_NH: Tensor, grads_NH: Tensor) -> tuple[Tensor, Tensor]:
        leaf_NH = rows_NH.detach().requires_grad_()
        exchange = plan_exchange(send_counts(counts_E, group))
        x_MH = by_expert(to_experts(leaf_NH, exchange).arrived(), exchange)
        returned_NH = from_experts(x_MH, exchange).arrived()
        (back_NH,) = torch.autograd.grad(returned_NH, leaf_NH, grads_NH)
        return returned_NH.detach(), back_NH

    return exchanged


def plain(counts_E: Tensor, mesh: Mesh) -> Pass:
    group = mesh.expert_group
    assert group is not None
    counts = plan_exchange(send_counts(counts_E, group))
    sent_R, received_R = counts.sent_R, counts.received_R

    def moved(rows_NH: Tensor) -> Tensor:
        there_MH = rows_NH.new_empty(sum(received_R), rows_NH.shape[1])
        dist.all_to_all_single(there_MH, rows_NH, received_R, sent_R, group=group)
        back_NH = torch.empty_like(rows_NH)
        dist.all_to_all_single(back_NH, there_MH, sent_R, received_R, group=group)
        return back_NH

    return lambda rows_NH, grads_NH: (moved(rows_NH), moved(grads_NH))

"""Bytes that a rank sends in one optimizer step, by purpose and link.

- exchange: rows of hidden states sent to their experts' ranks and back, in the forward and the backward pass: 4
  exchanges per layer and micro-batch, 6 when the MLP is recomputed (its forward exchanges run again), 2 more with
  `router.global_aux_loss_coef` (a forward pass counts the global batch's choices), and the counts,
  int64, of each chunk of tokens in each forward pass. The bytes passed to all-to-all are exact; that (N − 1) / N of
  them leave the rank, in a group of N, holds when choices are uniform.
- gradients: DeepSpeed all-reduces buckets in float32 in both stages (its `reduce_scatter` keeps only the rank's part of
  the result); a ring of n ranks sends 2 (n − 1) / n of their bytes. Stage 2 does so after every micro-batch, stage 1
  once per step.
- weights: every rank gathers what the others updated; a ring sends (n − 1) / n of the bytes.

Groups are those of moe/engine/deepspeed: the ranks of an expert group are consecutive, those that hold the same experts
strided. A ring's traffic between nodes is counted as the mean over its ranks, since a node's adapters share it.

Legend: T tokens of a micro-batch, k choices per token, H hidden, L layers, E experts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from moe.config import Config, Mlp, Recompute
from moe.plan.flops import counts_first
from moe.plan.gradients import element_size, trained_tensors


@dataclass(frozen=True, slots=True)
class ExchangeBytes:
    """Bytes that one rank passes to all-to-all in one optimizer step, those for itself included.

    `rows` counts the rank's own tokens, on the way to their experts and back: the experts' ranks pass the latter, so
    only the sum over ranks is exact. `counts` are int64. Zero without expert parallelism; with `router.capacity_factor`
    an upper bound.
    """

    rows: int
    counts: int
    leaving: float  # the share sent to other ranks when choices are uniform
    row_calls: int = 0  # of all-to-all, for rows
    count_calls: int = 0

    @property
    def total(self) -> int:
        return self.rows + self.counts

    @property
    def calls(self) -> int:
        return self.row_calls + self.count_calls


def exchange_bytes(config: Config, world_size: int) -> ExchangeBytes:
    """4 · T · k · H · bytes per layer and micro-batch, 2 more for each forward pass more (recomputation, the global
    batch's counts); E · 8 for each forward pass and chunk's counts. Each chunk has calls of its own."""
    model, router, train, expert = config.model, config.router, config.train, config.parallel.expert_parallel_size
    if expert == 1 or model.mlp is Mlp.dense:
        return ExchangeBytes(0, 0, 0.0)
    forwards = (1 if model.recompute is Recompute.none else 2) + counts_first(config)
    layers, steps = model.sparse_layer_numbers, config.accumulation(world_size)
    exchanges = steps * len(layers) * config.experts.exchanges
    rows = steps * train.micro_batch_size * train.sequence_length * router.choices_in(layers)
    return ExchangeBytes(
        rows=(2 * forwards + 2) * rows * model.hidden_size * element_size(config),
        counts=exchanges * forwards * router.num_experts * 8,
        leaving=(expert - 1) / expert,
        row_calls=exchanges * (2 * forwards + 2),
        count_calls=exchanges * forwards,
    )


@dataclass(frozen=True, slots=True)
class Flow:
    """Bytes that a rank sends per step inside its node and between nodes."""

    intra: float
    inter: float

    @property
    def total(self) -> float:
        return self.intra + self.inter


def plan_traffic(config: Config, nodes: int, ranks_per_node: int) -> dict[str, Flow]:
    """{purpose: Flow}, the mean over ranks, for `nodes` nodes of `ranks_per_node` ranks."""
    world, expert = nodes * ranks_per_node, config.parallel.expert_parallel_size
    tensors, size = trained_tensors(config, world), element_size(config)
    exchange = exchange_bytes(config, world)
    near = _same_node(world, expert, ranks_per_node)
    leaving = exchange.total * exchange.leaving
    reductions = config.accumulation(world) if config.parallel.zero_stage == 2 else 1
    replicas = [list(range(first, world, expert)) for first in range(expert)]
    flows = {"expert exchange": Flow(leaving * near, leaving * (1 - near))}
    parts = [("shared", tensors.shared, [list(range(world))]), ("expert", tensors.experts, replicas)]
    for name, count, groups in parts:
        if not count:
            continue
        between = _crossings(groups[0], ranks_per_node)
        ring = (len(groups[0]) - 1) / len(groups[0])
        for what, sent in ((f"{name} gradients", 8 * reductions * count), (f"{name} weights", size * count)):
            flows[what] = Flow(sent * ring * (1 - between), sent * ring * between)
    return flows


def _same_node(world: int, expert: int, ranks_per_node: int) -> float:
    """The share of a rank's expert-parallel peers that are on its node; the mean over ranks."""
    if expert == 1:
        return 1.0
    near = 0
    for first in range(0, world, expert):
        of_node = Counter(rank // ranks_per_node for rank in range(first, first + expert))
        near += sum(count * (count - 1) for count in of_node.values())
    return near / (world * (expert - 1))


def _crossings(ring: list[int], ranks_per_node: int) -> float:
    """The share of a ring's links that connect two nodes."""
    hops = zip(ring, [*ring[1:], ring[0]], strict=True)
    return sum(a // ranks_per_node != b // ranks_per_node for a, b in hops) / len(ring)

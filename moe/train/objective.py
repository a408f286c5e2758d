"""The training step: the loop, every benchmark and the tests all use this one.

For each of the step's micro-batches: forward pass → language-model and balance losses → backward pass → engine. The
language-model loss is the sum over the target tokens of the step's whole global batch divided by their number, so it
doesn't depend on how many ranks or micro-batches the batch is cut into; balance losses are means over micro-batches,
each of which weighs as many tokens as it has without those that only fill up its sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe.config import Config
from moe.data.loader import Batch
from moe.data.packing import NO_TARGET
from moe.distributed.mesh import Mesh
from moe.engine.base import Engine, StepResult
from moe.sparse import Randomness, Router, balance_loss, routers_of
from moe.train.metrics import StepSums
from moe.train.optim import lr_scales
from moe.train.router_updates import RouterUpdates


@dataclass(slots=True)
class TrainedStep:
    """The result of one optimizer step.

    `metrics` are over the global batch. `losses` are this rank's micro-batches' total losses, each with its sample ids.
    `busy_seconds` and `flags` are what the caller gave, by rank and summed over the ranks.
    """

    result: StepResult
    metrics: dict[str, Any]
    losses: list[tuple[Tensor, Tensor]]
    busy_seconds: list[float]
    flags: list[float]


def training_step(
    config: Config,
    mesh: Mesh,
    engine: Engine,
    batches: Sequence[Batch],
    *,
    step: int,
    lr: float,
    norm_limit: float | None = None,
    busy_seconds: float = 0.0,
    flags: Callable[[], Sequence[float]] = list,
    before_micro_batch: Callable[[int], None] | None = None,
    diagnose: bool = True,
) -> TrainedStep:
    """Optimizer step number `step` (0-based) on this rank's micro-batches of it, on the CPU. A collective.

    `norm_limit` is passed to `Engine.step`. `busy_seconds` and `flags()`, called after the update, are reduced together
    with the metrics, so they need no collective of their own. `before_micro_batch` is called with each
    micro-batch's index. `diagnose=False` leaves out what `moe.sparse.diagnostics` and `RouterUpdates` measure, for a
    benchmark of what they cost.
    """
    (targets, tokens), scales = _global_counts(batches, mesh), lr_scales(config, step)
    micro_batches = len(batches) * mesh.data_parallel_size
    sums, losses = StepSums(mesh, diagnose=diagnose), list[tuple[Tensor, Tensor]]()
    routers, sparse_layers = list(routers_of(engine.model)), len(config.model.sparse_layer_numbers)
    for router in routers:
        router.begin_step(step, config.train.steps)
    if any(router.counts_global_batch for router in routers):
        _count_global_batch(config, mesh, engine.model, batches, routers, step)
    updates = RouterUpdates(routers if diagnose else [])
    result: StepResult | None = None
    for index, batch in enumerate(batches):
        if before_micro_batch is not None:
            before_micro_batch(index)
        here = batch.to(mesh.device)
        output = engine(here.input_ids_BS, labels_BS=here.labels_BS, **_settings(config, here, step))
        # The engine averages over micro-batches and ranks: this makes that average Σ nats / Σ targets.
        loss = output.lm_loss_sum * (micro_batches / max(1, targets))
        weight = batch.tokens * micro_batches / max(1, tokens)  # 1 where nothing is filled up
        if sparse_layers:
            balance = balance_loss(output.routers, num_layers=sparse_layers)
            loss = loss + (balance if weight == 1 else weight * balance)
        engine.backward(loss)
        result = engine.step(lr, norm_limit, scales)
        losses.append((loss.detach(), batch.sample_ids_B))
        sums.add(output.lm_loss_sum, loss, output.routers, weight)
    assert result is not None, f"{len(batches)} micro-batches are not a whole step of {engine.accumulation}"
    totals = sums.reduced(targets, busy_seconds, flags(), updates.gradients())
    if result.skipped is None:
        for router, counts_E in zip(routers, totals.counts, strict=True):
            router.after_step(counts_E.to(mesh.device))
    metrics = totals.metrics | updates.metrics()
    return TrainedStep(result, metrics, losses, totals.by_rank, totals.flags)


def _settings(config: Config, batch: Batch, step: int) -> dict[str, Any]:
    """What the forward pass in training takes beside token ids and labels."""
    unmasked = {} if config.data.document_mask else {"document_ids_BS": None, "document_lengths": None}
    return {
        **batch.layout,
        **unmasked,
        "randomness": Randomness.of(config.train.seed, step, batch.sample_ids_B),
        "neftune_noise_alpha": config.train.neftune_noise_alpha,
    }


@torch.no_grad()
def _count_global_batch(
    config: Config, mesh: Mesh, model: nn.Module, batches: Sequence[Batch], routers: list[Router], step: int
) -> None:
    """Gives the routers the choices of all ranks and micro-batches of the step, before the first is trained on.

    The global batch's balance loss is E Σ f P with both over the whole batch, and only P has a gradient: with f known,
    its gradient is the mean of the micro-batches', by their tokens. f is known after a forward pass over all of them.
    """
    counts: list[Tensor] = []
    for batch in batches:
        here = batch.to(mesh.device)
        output = model(here.input_ids_BS, **_settings(config, here, step))
        mine = [routed.counts_E for routed in output.routers]
        counts = [a + b for a, b in zip(counts, mine, strict=True)] if counts else mine
    summed = mesh.sum_(torch.cat(counts)).split([len(counts_E) for counts_E in counts])
    for router, counts_E in zip(routers, summed, strict=True):
        router.global_counts_E = counts_E


def _global_counts(batches: Sequence[Batch], mesh: Mesh) -> tuple[int, int]:
    """Targets, and tokens that are routed, of the step's global batch."""
    targets = sum(int((batch.labels_BS != NO_TARGET).sum()) for batch in batches)
    mine = torch.tensor([targets, sum(batch.tokens for batch in batches)], device=mesh.device)
    targets, tokens = mesh.sum_(mine).tolist()
    return targets, tokens

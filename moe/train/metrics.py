"""Metrics of one optimizer step, exact over its whole global batch: one packed sum over ranks at the end of the step.

E experts of a layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from moe.distributed.mesh import Mesh
from moe.sparse.balance import max_violation
from moe.sparse.routers.base import RouterOutput

# In every line, whatever the model: null in a dense model, and for a loss that its routers don't have.
ALWAYS: dict[str, Any] = {
    "load_balancing_loss": None,
    "max_violation": None,
    "dead_experts": None,
    "dropped_fraction": None,
    "expert_shares": [],
}


class StepSums:
    """Sums over a step's micro-batches on this rank; `reduced` adds up the ranks and names the metrics.

    The names of a router's losses and diagnostics are the metrics' names.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._names: list[list[str]] = []  # of each layer's scalars, in the order in which they are packed
        self._scalars: Tensor | None = None  # [2 + scalars of all layers]: see `add`
        self._counts: list[Tensor] = []  # [E] of each layer
        self._micro_batches = 0

    def add(self, lm_loss_sum: Tensor, total_loss: Tensor, routers: list[RouterOutput]) -> None:
        """`lm_loss_sum` in nats over this micro-batch's targets; `total_loss` is what was given to backward."""
        with torch.no_grad():
            layers = [_scalars(router) for router in routers]
            parts = [lm_loss_sum, total_loss, *(value for layer in layers for value in layer.values())]
            scalars = torch.stack([part.detach().double().reshape(()) for part in parts])
            counts = [router.counts_E.double() for router in routers]
        names = [list(layer) for layer in layers]
        if self._scalars is None:
            self._scalars, self._counts, self._names = scalars, counts, names
        else:
            assert names == self._names, "the routers named other metrics in an earlier micro-batch"
            self._scalars = self._scalars + scalars
            self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)]
        self._micro_batches += 1

    def reduced(
        self, targets: int, mine: float, flags: Sequence[float]
    ) -> tuple[dict[str, Any], list[Tensor], list[float], list[float]]:
        """The step's metrics, each layer's counts_E (int64, on the CPU), every rank's `mine`, and the ranks' summed
        `flags`. A collective.

        `targets` is the number of target tokens of the global batch.
        """
        assert self._scalars is not None
        by_rank = self._scalars.new_zeros(self._mesh.world_size)
        by_rank[self._mesh.rank] = mine
        parts = [by_rank, self._scalars.new_tensor(flags), self._scalars, *self._counts]
        summed = self._mesh.sum_(torch.cat(parts)).cpu().split([len(part) for part in parts])
        ranks, raised, packed, counts = summed[0], summed[1], summed[2], list(summed[3:])
        metrics = self._metrics(packed, counts, targets)
        return metrics, [counts_E.long() for counts_E in counts], ranks.tolist(), raised.tolist()

    def _metrics(self, packed: Tensor, counts: list[Tensor], targets: int) -> dict[str, Any]:
        micro_batches = self._micro_batches * self._mesh.data_parallel_size
        metrics: dict[str, Any] = {
            "loss": packed[1].item() / micro_batches,
            "lm_loss": packed[0].item() / max(1, targets),
            **ALWAYS,
        }
        if not counts:
            return metrics
        by_name: dict[str, list[Tensor]] = {}  # sums over micro-batches and ranks, a layer each
        for name, value in zip(chain.from_iterable(self._names), packed[2:], strict=True):
            by_name.setdefault(name, []).append(value)
        dropped = torch.stack(by_name.pop(DROPPED)).sum()
        chosen = torch.stack([counts_E.sum() for counts_E in counts]).sum()
        for name, sums in by_name.items():
            layers = torch.stack(sums) / micro_batches
            metrics[name] = layers.mean().item()
            metrics[f"{name}_layers"] = layers.tolist()
        return metrics | {
            "max_violation": torch.stack([max_violation(counts_E) for counts_E in counts]).mean().item(),
            "dead_experts": sum(int((counts_E == 0).sum()) for counts_E in counts),
            "dropped_fraction": (dropped / chosen).item(),
            "expert_shares": [(counts_E / counts_E.sum()).tolist() for counts_E in counts],
        }


DROPPED = "dropped"
TAKEN = {DROPPED, "loss", "lm_loss", *ALWAYS} - {"load_balancing_loss"}


def _scalars(router: RouterOutput) -> dict[str, Tensor]:
    twice = router.losses.keys() & router.diagnostics.keys()
    taken = (router.losses.keys() | router.diagnostics.keys()) & TAKEN
    assert not twice | taken, f"{sorted(twice | taken)}: a router's names must differ, also from other metrics'"
    return {name: loss.value for name, loss in router.losses.items()} | router.diagnostics | {DROPPED: router.dropped}


def entropy_nats(counts_V: Tensor) -> float:
    """Entropy of the empirical distribution in nats: what a model that knows token frequencies alone can reach."""
    shares = counts_V.double() / counts_V.sum()
    return float(-torch.xlogy(shares, shares).sum())


def bits_per_byte(loss_sum_nats: float, byte_count: float) -> float:
    """Summed cross-entropy as bits over the UTF-8 bytes that the targets stand for: comparable across tokenizers."""
    return loss_sum_nats / math.log(2) / byte_count if byte_count else math.nan


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product on this rank's share of the machine (best of five, after a warm-up)."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for attempt in range(6):
        seconds = _timed(lambda: a @ b, device)
        if attempt:
            best = max(best, 2 * size**3 / seconds)
    return best


def _timed(action: Callable[[], object], device: torch.device) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    action()
    return now() - start

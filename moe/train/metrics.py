"""Figures of one optimizer step, exact over its whole global batch: one packed sum over ranks at the end of the step.

L sparse layers, E experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe.distributed.mesh import Mesh
from moe.sparse.balance import max_violation, router_entropy
from moe.sparse.routers.base import RouterOutput


class StepSums:
    """Sums over a step's micro-batches on this rank; `reduced` adds up the ranks and names the metrics."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._scalars: Tensor | None = None  # [2 + 4 L]: see `add`
        self._counts_LE: Tensor | None = None
        self._micro_batches = 0

    def add(self, lm_loss_sum: Tensor, total_loss: Tensor, routers: list[RouterOutput]) -> None:
        """`lm_loss_sum` in nats over this micro-batch's targets; `total_loss` is what was given to backward."""
        with torch.no_grad():
            parts = [lm_loss_sum, total_loss]
            for router in routers:
                parts += [router.load_balancing_loss, router.z_loss, router_entropy(router.probs_TE), router.dropped]
            scalars = torch.stack([part.detach().double().reshape(()) for part in parts])
            self._scalars = scalars if self._scalars is None else self._scalars + scalars
            if routers:
                counts = torch.stack([router.counts_E for router in routers]).double()
                self._counts_LE = counts if self._counts_LE is None else self._counts_LE + counts
        self._micro_batches += 1

    def reduced(
        self, targets: int, mine: float, flags: Sequence[float]
    ) -> tuple[dict[str, Any], list[float], list[float]]:
        """The step's metrics, every rank's `mine`, and `flags` summed over the ranks.

        `targets` is the number of target tokens of the global batch.
        """
        assert self._scalars is not None
        by_rank = self._scalars.new_zeros(self._mesh.world_size)
        by_rank[self._mesh.rank] = mine
        parts = [by_rank, self._scalars.new_tensor(flags), self._scalars]
        if self._counts_LE is not None:
            parts.append(self._counts_LE.flatten())
        own = [len(by_rank), len(by_rank) + len(flags)]
        ranks, raised, packed = self._mesh.sum_(torch.cat(parts)).cpu().tensor_split(own)
        return self._figures(packed, targets), ranks.tolist(), raised.tolist()

    def _figures(self, packed: Tensor, targets: int) -> dict[str, Any]:
        micro_batches = self._micro_batches * self._mesh.world_size
        metrics: dict[str, Any] = {
            "loss": packed[1].item() / micro_batches,
            "lm_loss": packed[0].item() / max(1, targets),
        }
        if self._counts_LE is None:
            return metrics | DENSE
        layers, experts = self._counts_LE.shape
        per_layer = packed[2 : 2 + 4 * layers].view(layers, 4)
        counts_LE = packed[2 + 4 * layers :].view(layers, experts)
        balance, z_loss, entropy = (per_layer[:, :3] / micro_batches).unbind(-1)
        return metrics | {
            "load_balancing_loss": balance.mean().item(),
            "router_z_loss": z_loss.mean().item(),
            "max_violation": max_violation(counts_LE).mean().item(),
            "router_entropy": entropy.mean().item(),
            "dead_experts": int((counts_LE == 0).sum()),
            "dropped_fraction": (per_layer[:, 3].sum() / counts_LE.sum()).item(),
            "expert_shares": (counts_LE / counts_LE.sum(-1, keepdim=True)).tolist(),
            "load_balancing_loss_layers": balance.tolist(),
        }


DENSE: dict[str, Any] = {
    "load_balancing_loss": None,
    "router_z_loss": None,
    "max_violation": None,
    "router_entropy": None,
    "dead_experts": None,
    "dropped_fraction": None,
    "expert_shares": [],
    "load_balancing_loss_layers": [],
}


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

"""Metrics of one optimizer step, exact over its whole global batch: one packed sum over ranks at the end of the step.

L sparse layers, E experts of a layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe.distributed.mesh import Mesh
from moe.kernels.bfloat16_products import mm
from moe.kernels.float32_products import float32_products
from moe.sparse.diagnostics import DIAGNOSTICS, demand
from moe.sparse.routers.base import RouterOutput

# In every line, whatever the model: null in a dense model, and for a loss that its routers don't have.
ALWAYS: dict[str, Any] = {
    "load_balancing_loss": None,
    "max_violation": None,
    "dead_experts": None,
    "dropped_fraction": None,
    "expert_shares": [],
}
# What the diagnostics measure, by name: each once, however many diagnostics take it.
SUMMED = {one.measure.__name__: one.measure for one in DIAGNOSTICS.values() if not one.largest}
LARGEST = {one.measure.__name__: one.measure for one in DIAGNOSTICS.values() if one.largest}


@dataclass(frozen=True, slots=True)
class StepTotals:
    """A step's metrics; each layer's counts_E (int64, on the CPU); every rank's `mine`; the ranks' summed flags."""

    metrics: dict[str, Any]
    counts: list[Tensor]
    by_rank: list[float]
    flags: list[float]


class StepSums:
    """Sums over a step's micro-batches on this rank; `reduced` adds up the ranks and names the metrics.

    The names of a router's losses and diagnostics are the metrics' names. `diagnose=False` measures only the
    counts and what the routers name themselves.
    """

    def __init__(self, mesh: Mesh, *, diagnose: bool = True) -> None:
        self._mesh = mesh
        self._summed, self._largest = (SUMMED, LARGEST) if diagnose else ({demand.__name__: demand}, {})
        self._names: list[dict[str, int]] = []  # of each layer's sums: how many numbers, in the order of packing
        self._scalars: list[set[str]] = []  # those of them that are the router's own
        self._sums: Tensor | None = None  # [2 + numbers of all layers]: see `add`
        self._maxima: Tensor | None = None  # [layers, LARGEST]
        self._tokens = 0  # that were routed
        self._micro_batches = 0

    def add(self, lm_loss_sum: Tensor, total_loss: Tensor, routers: list[RouterOutput], weight: float = 1.0) -> None:
        """`lm_loss_sum` in nats over this micro-batch's targets; `total_loss` is what was given to backward. `weight`
        is the micro-batch's in means over micro-batches: its routed tokens over their mean."""
        with torch.no_grad():
            own = [_own(router, weight) for router in routers]
            layers = [
                named | {name: measure(router) for name, measure in self._summed.items()}
                for named, router in zip(own, routers, strict=True)
            ]
            parts = [lm_loss_sum, total_loss, *(value for layer in layers for value in layer.values())]
            sums = torch.cat([part.detach().double().reshape(-1) for part in parts])
            maxima = [measure(router).double() for router in routers for measure in self._largest.values()]
            largest = torch.stack(maxima).view(len(routers), -1) if maxima else sums.new_zeros(len(routers), 0)
        names = [{name: value.numel() for name, value in layer.items()} for layer in layers]
        if self._sums is None or self._maxima is None:
            self._sums, self._maxima, self._names, self._scalars = sums, largest, names, [set(one) for one in own]
        else:
            assert names == self._names, "the routers named other metrics in an earlier micro-batch"
            self._sums, self._maxima = self._sums + sums, torch.maximum(self._maxima, largest)
        self._tokens += routers[0].choices.num_tokens if routers else 0
        self._micro_batches += 1

    def reduced(
        self, targets: int, mine: float, flags: Sequence[float], gradients: Sequence[Tensor] = ()
    ) -> StepTotals:
        """The step's totals over all ranks. A collective.

        `targets` is the number of target tokens of the global batch. `gradients` are those of each layer's router over
        this rank's micro-batches, one vector a layer (none: no metric); their mean over the ranks is the step's.
        """
        assert self._sums is not None
        assert self._maxima is not None
        ranks = self._mesh.world_size
        by_rank, maxima = self._sums.new_zeros(ranks), self._sums.new_zeros(ranks, *self._maxima.shape)
        by_rank[self._mesh.rank], maxima[self._mesh.rank] = mine, self._maxima  # a sum that keeps the ranks apart
        parts = [by_rank, self._sums.new_tensor([self._tokens, *flags]), maxima.flatten(), self._sums]
        parts += [gradient.double() for gradient in gradients]
        summed = self._mesh.sum_(torch.cat(parts)).split([len(part) for part in parts])
        norms = [torch.linalg.vector_norm(gradient).reshape(1) / ranks for gradient in summed[4:]]
        sizes = [*(len(part) for part in summed[:4]), len(norms)]
        busy, raised, maxima, sums, norms = torch.cat([*summed[:4], *norms]).cpu().split(sizes)
        layers = self._by_layer(sums[2:], maxima.view(ranks, *self._maxima.shape).amax(0))
        tokens, *flags = raised.tolist()
        metrics = self._metrics(sums, layers, targets, tokens)
        if gradients:
            metrics |= layered("router_gradient_norm", norms)
        counts = [layer[demand.__name__].long() for layer in layers]
        return StepTotals(metrics, counts, busy.tolist(), flags)

    def _by_layer(self, sums: Tensor, maxima: Tensor) -> list[dict[str, Tensor]]:
        layers, start = list[dict[str, Tensor]](), 0
        for names, largest in zip(self._names, maxima, strict=True):
            layer = dict(zip(self._largest, largest, strict=True))
            for name, size in names.items():
                layer[name] = sums[start : start + size]
                start += size
            layers.append(layer)
        return layers

    def _metrics(self, sums: Tensor, layers: list[dict[str, Tensor]], targets: int, tokens: float) -> dict[str, Any]:
        micro_batches = self._micro_batches * self._mesh.data_parallel_size
        metrics: dict[str, Any] = {
            "loss": sums[1].item() / micro_batches,
            "lm_loss": sums[0].item() / max(1, targets),
            **ALWAYS,
        }
        if not layers:
            return metrics
        by_name: dict[str, dict[int, Tensor]] = {}  # the routers' own, sums over micro-batches and ranks, by layer
        for place, (layer, names) in enumerate(zip(layers, self._scalars, strict=True)):
            for name in layer:
                if name in names:
                    by_name.setdefault(name, {})[place] = layer[name][0]
        for name, by_place in by_name.items():
            values = torch.stack([*by_place.values()]) / micro_batches
            values_L = values.new_full((len(layers),), math.nan)  # NaN: the layer's router has none of this name
            values_L[[*by_place]] = values
            metrics |= layered(name, values_L) | {name: values.mean().item()}
        for name, diagnostic in DIAGNOSTICS.items():
            measure = diagnostic.measure.__name__
            if measure not in layers[0]:
                continue
            reduced = [layer[measure] for layer in layers]
            finished = torch.stack([diagnostic.finish(value, tokens).reshape(()) for value in reduced])
            metrics |= layered(name, finished, diagnostic.over_layers or torch.mean)
            if diagnostic.over_layers is None:
                metrics[name] = diagnostic.finish(torch.stack(reduced).sum(0), tokens * len(layers)).item()
        shares = [layer[demand.__name__] / layer[demand.__name__].sum() for layer in layers]
        return metrics | {"expert_shares": [shares_E.tolist() for shares_E in shares]}


def layered(name: str, values: Tensor, over_layers: Callable[[Tensor], Tensor] = torch.mean) -> dict[str, Any]:
    """The two metrics of a scalar that each layer has."""
    return {name: over_layers(values).item(), f"{name}_layers": values.tolist()}


TAKEN = {"loss", "lm_loss", *ALWAYS, *SUMMED, *LARGEST, *DIAGNOSTICS} - {"load_balancing_loss"}


def _own(router: RouterOutput, weight: float) -> dict[str, Tensor]:
    """The losses and diagnostics that a router names itself, times `weight`."""
    twice = router.losses.keys() & router.diagnostics.keys()
    taken = (router.losses.keys() | router.diagnostics.keys()) & TAKEN
    assert not twice | taken, f"{sorted(twice | taken)}: a router's names must differ, also from other metrics'"
    own = {name: loss.value for name, loss in router.losses.items()} | router.diagnostics
    return own if weight == 1 else {name: weight * value for name, value in own.items()}


def entropy_nats(counts_V: Tensor) -> float:
    """Entropy of the empirical distribution in nats: what a model that knows token frequencies alone can reach."""
    shares = counts_V.double() / counts_V.sum()
    return float(-torch.xlogy(shares, shares).sum())


def bits_per_byte(loss_sum_nats: float, byte_count: float) -> float:
    """Summed cross-entropy as bits over the UTF-8 bytes that the targets stand for: comparable across tokenizers."""
    return loss_sum_nats / math.log(2) / byte_count if byte_count else math.nan


def measure_peak_flops(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int] | None = None,
    product: Callable[[Tensor, Tensor], Tensor] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOP/s of a matrix product on this rank's share of the machine (best of five, after a warm-up).

    `shape` is (M, K, N) of [M, K] × [K, N], the second factor stored transposed as weights are; None: a large square.
    `product` None: by the way that was chosen for products of `dtype`.
    """
    product = product or float32_products(mm)
    rows, inner, columns = shape or 3 * ((1024 if device.type == "cpu" else 8192),)
    a, b = (torch.randn(size, inner, device=device, dtype=dtype) for size in (rows, columns))
    best = 0.0
    for attempt in range(6):
        seconds = _timed(lambda: product(a, b.t()), device, clock)
        if attempt:
            best = max(best, 2 * rows * inner * columns / seconds)
    return best


def _timed(action: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

    start = now()
    action()
    return now() - start

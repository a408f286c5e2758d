"""The gradient of each router in a step, and how far the step moves the router.

A router's gradient is caught where autograd adds it to the parameter, so every engine, ZeRO stage and precision gives
the same: afterwards the engine may partition, overwrite or free it. Only routers are stored a second time: experts ×
hidden numbers per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe.sparse import Router
from moe.sparse.diagnostics import expert_bias
from moe.train.metrics import layered


class RouterUpdates:
    """Watches the routers from here to `metrics`, around one optimizer step. Reads only."""

    def __init__(self, routers: Sequence[Router]) -> None:
        self._routers = routers
        self._parameters = [list(router.parameters()) for router in routers]
        self._gradients = [[torch.zeros_like(p, dtype=torch.float32) for p in layer] for layer in self._parameters]
        self._before = [[p.detach().clone() for p in layer] for layer in self._parameters]
        self._hooks: list[Any] = []
        for layer, sums in zip(self._parameters, self._gradients, strict=True):
            trained = [(p, total) for p, total in zip(layer, sums, strict=True) if p.requires_grad]
            self._hooks += [p.register_hook(partial(_add, total)) for p, total in trained]

    def gradients(self) -> list[Tensor]:
        """Each layer's gradient of this rank's micro-batches as one float32 vector; their mean over the ranks is the
        step's gradient, before clipping (engines divide by the number of micro-batches in `backward`)."""
        return [_flat(layer) for layer in self._gradients]

    def metrics(self) -> dict[str, Any]:
        """`router_update_norm`, ‖w after − w before‖ of each layer's router as the model has it; 0 for a skipped step,
        and in bfloat16 for an update that rounding loses. Where routers have a bias for balance, `router_bias` [L][E]
        after the step, and its range."""
        for hook in self._hooks:
            hook.remove()
        norms = [
            torch.linalg.vector_norm(_flat([p.detach() - old for p, old in zip(layer, before, strict=True)]))
            for layer, before in zip(self._parameters, self._before, strict=True)
        ]
        if not norms:
            return {}
        return layered("router_update_norm", torch.stack(norms).cpu()) | self._biases()

    def _biases(self) -> dict[str, Any]:
        found = [expert_bias(router) for router in self._routers]
        if all(bias_E is None for bias_E in found):
            return {}
        counts = [router.config.num_experts for router in self._routers]
        biases = [
            torch.full((count,), torch.nan) if bias_E is None else bias_E.float().cpu()
            for bias_E, count in zip(found, counts, strict=True)
        ]
        ranges = torch.stack([bias_E.amax() - bias_E.amin() for bias_E in biases])
        return {"router_bias": [bias_E.tolist() for bias_E in biases]} | layered(
            "router_bias_range", ranges, torch.nanmean
        )


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """float32 [numbers of all]."""
    return torch.cat([tensor.float().flatten() for tensor in tensors]) if tensors else torch.zeros(0)


def _add(total: Tensor, gradient: Tensor) -> None:
    total += gradient.detach()

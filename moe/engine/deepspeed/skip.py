"""Steps that DeepSpeed's optimizers are made to refuse: no weight, master weight, moment or Adam step moves anywhere.

They refuse an update whose gradient norm is not finite, on all ranks together. Here a norm above a limit counts as
such too. The decision is reduced over the ranks, because norms may differ in their last bit.

- ZeRO-1/2 asks `scaled_global_norm` and refuses when it is −1: the limit is one more reason to answer that.
- `BF16_Optimizer` computes its norm in the middle of `step`. Clipping is what it does next: it asks
  `get_grads_for_norm(for_clipping=True)`, before anything has changed. There we leave the step; the engine clears
  the gradients, as after every step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moe.distributed.mesh import Mesh


class NormLimit:
    """Set `limit` (None: none) before each of the optimizer's steps, the same on all ranks; read `norm` after it.

    `norm` is the gradient norm before clipping over all parameters, NaN when it is not finite.
    """

    def __init__(self, zero: Any, mesh: Mesh) -> None:
        """Patches a DeepSpeed ZeRO-1/2 optimizer or BF16_Optimizer."""
        self.limit: float | None = None
        self.norm = math.nan
        self._mesh = mesh
        if hasattr(zero, "scaled_global_norm"):
            self._watch_zero(zero)
        else:
            self._watch_bf16(zero)

    def _watch_zero(self, zero: Any) -> None:
        original = zero.scaled_global_norm

        def scaled_global_norm(norm_type: float = 2) -> Tensor:
            norm = original(norm_type)
            return torch.full_like(norm, -1.0) if self._skips(norm) else norm

        zero.scaled_global_norm = scaled_global_norm

    def _watch_bf16(self, zero: Any) -> None:
        gradients, step = zero.get_grads_for_norm, zero.step
        assert zero.clip_grad > 0, "without clipping its step can't be left"

        def get_grads_for_norm(for_clipping: bool = False) -> Any:
            if for_clipping and self._skips(zero._global_grad_norm):
                raise _Skipped
            return gradients(for_clipping)

        def guarded_step() -> None:
            try:
                step()
            except _Skipped:
                zero.overflow = True

        zero.get_grads_for_norm, zero.step = get_grads_for_norm, guarded_step

    def _skips(self, norm: Tensor | float) -> bool:
        """A collective if there is a limit."""
        value = float(norm)
        self.norm = value if math.isfinite(value) and value >= 0 else math.nan  # DeepSpeed answers −1 for a NaN
        if self.limit is None:
            return False
        over = torch.tensor(float(value > self.limit), device=self._mesh.device)
        return bool(self._mesh.sum_(over) > 0)


class _Skipped(Exception):
    """Leaves BF16_Optimizer's step."""

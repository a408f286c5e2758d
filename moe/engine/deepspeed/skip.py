"""Makes DeepSpeed's optimizers skip a step: no weight, moment or Adam step changes on any rank.

DeepSpeed skips an update whose gradient norm is not finite, on all ranks together. Here an update whose norm is over a
limit is skipped too. The decision is reduced over the ranks, because their norms may differ in the last bit.

- ZeRO-1/2 calls `scaled_global_norm` and skips the step when it returns −1. A norm over the limit also returns −1.
- `BF16_Optimizer` computes its norm inside `step`, then calls `get_grads_for_norm(for_clipping=True)` before it changes
  anything. An exception raised there ends the step; the engine clears the gradients, as after every step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

from moe.distributed.mesh import Mesh
from moe.engine.deepspeed.borrowed import borrow, borrow_value

LOST = "steps over the norm limit would be applied, and the norm unknown"


class NormLimit:
    """Call `begin_step` before each of the optimizer's steps; read `norm` after it.

    `norm` is the gradient norm over all parameters before clipping, NaN when it is not finite. `asked`: DeepSpeed has
    called the patched function; `skips`: the norm was over the limit on some rank.
    """

    def __init__(self, zero: Any, mesh: Mesh) -> None:
        """Patches a DeepSpeed ZeRO-1/2 optimizer or BF16_Optimizer."""
        self.limit: float | None = None
        self.norm, self.asked, self.skips = math.nan, False, False
        self._mesh = mesh
        if isinstance(zero, BF16_Optimizer):
            self._watch_bf16(zero)
        else:
            self._watch_zero(zero)

    def begin_step(self, limit: float | None) -> None:
        """`limit` is the same on all ranks (None: none)."""
        self.limit, self.norm, self.asked, self.skips = limit, math.nan, False, False

    def _watch_zero(self, zero: Any) -> None:
        original = borrow(zero, "scaled_global_norm", "norm_type", lost=LOST)

        def scaled_global_norm(norm_type: float = 2) -> Tensor:
            norm = original(norm_type)
            return torch.full_like(norm, -1.0) if self._skips(norm) else norm

        zero.scaled_global_norm = scaled_global_norm

    def _watch_bf16(self, zero: Any) -> None:
        gradients = borrow(zero, "get_grads_for_norm", "for_clipping", lost=LOST)
        step = borrow(zero, "step", "closure", lost=LOST)
        assert borrow_value(zero, "clip_grad", lost=LOST) > 0, "without clipping its step can't be interrupted"

        def get_grads_for_norm(for_clipping: bool = False) -> Any:
            if for_clipping and self._skips(borrow_value(zero, "_global_grad_norm", lost=LOST)):
                raise _Skipped
            return gradients(for_clipping)

        def guarded_step() -> None:
            try:
                step()
            except _Skipped:
                zero.overflow = True

        zero.get_grads_for_norm, zero.step = get_grads_for_norm, guarded_step

    def _skips(self, norm: Tensor | float) -> bool:
        """Whether the norm is over the limit on any rank; stores the norm. A collective if there is a limit."""
        value, self.asked = float(norm), True
        self.norm = value if math.isfinite(value) and value >= 0 else math.nan  # DeepSpeed returns −1 for NaN
        if self.limit is None:
            return False
        over = torch.tensor(float(value > self.limit), device=self._mesh.device)
        self.skips = bool(self._mesh.sum_(over) > 0)
        return self.skips


class _Skipped(Exception):
    """Raised to leave BF16_Optimizer's step before it changes anything."""

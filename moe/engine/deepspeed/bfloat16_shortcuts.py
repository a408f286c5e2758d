"""Removes passes over the gradients that DeepSpeed's BF16_Optimizer makes at every step, and on a CPU memory that it
holds. Losses and weights stay bit-identical (tests/distributed/test_shortcuts.py).

- DeepSpeed converts a gradient to a new float32 tensor and adds that to its sum, which it has set to zero, twice. Here
  a step's first gradient is converted straight into the sum, and later ones are added without a converted copy.
- On one rank DeepSpeed copies all sums into a bucket, multiplies it by 1 and copies it back. Here it doesn't.
- DeepSpeed keeps the sums, 4 bytes a parameter, between steps. On a CPU their memory is given back after the update,
  for the next step's activations; the memory that these leave in the heap is given back during the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe.engine import heap
from moe.engine.deepspeed.borrowed import borrow, borrow_value, require_meaning

TRIMS = 24  # of the heap in a backward pass, at most: each takes about a millisecond
LEAST = 4 * 2**20  # bytes of sums between two trims


class BFloat16Shortcuts:
    """Patches a new BF16_Optimizer and its engine, before their first step."""

    def __init__(self, engine: Any, zero: Any, world_size: int) -> None:
        lost = "gradients would be those of an earlier step"
        borrow(zero, "_update_hp_grad", "lp", "group_idx", "param_idx", "clear_lp_grads", lost=lost)
        borrow(zero, "clear_hp_grads", lost=lost)
        flats: list[Tensor] = borrow_value(zero, "fp32_groups_gradients_flat", lost=lost)
        self._flat = [flat for flat in flats if flat.device.type == "cpu"]  # a GPU keeps them
        self._between = max(LEAST, sum(flat.nbytes for flat in self._flat) // TRIMS)
        self._new = 0  # bytes of sums that got their first gradient since the heap was trimmed
        borrow_value(zero, "immediate_grad_update", lost=lost)
        self._sums: list[list[Tensor]] = borrow_value(zero, "fp32_groups_gradients", lost=lost)
        self._started: list[list[bool]] = borrow_value(zero, "fp32_groups_has_gradients", lost=lost)
        self._of_reduction = borrow(zero, "get_grads_for_reduction", lost=lost)
        self._reductions = 0
        zero._update_hp_grad = self._add
        zero.clear_hp_grads = self._restart
        zero.get_grads_for_reduction = self._for_reduction
        if world_size == 1:
            borrow(engine, "buffered_allreduce_fallback", "grads", "elements_per_buffer", lost=lost)
            engine.buffered_allreduce_fallback = lambda grads=None, elements_per_buffer=0: self._for_reduction()

    def begin_step(self) -> None:
        """Does nothing: reductions are counted from one update to the next."""

    def end_update(self, applied: bool) -> None:
        """Raises RuntimeError unless sums that got no gradient were set to zero, which comes with the reduction."""
        reductions, self._reductions = self._reductions, 0
        require_meaning(not applied or reductions == 1, "ask for the gradients to reduce once an update")

    @torch.no_grad()
    def _add(self, lp: Any, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        """Adds a parameter's bfloat16 gradient to its float32 sum."""
        if lp.grad is None:
            return
        total, gradient = self._sums[group_idx][param_idx], lp.grad.reshape(-1)
        if self._started[group_idx][param_idx]:
            total.add_(gradient)
        else:
            total.copy_(gradient)
            self._new += total.nbytes
        lp._hp_grad = total
        self._started[group_idx][param_idx] = True
        if clear_lp_grads:
            lp.grad.zero_()
        if self._flat and self._new >= self._between:
            heap.trim()
            self._new = 0

    def _restart(self) -> None:
        """The next gradient of each parameter replaces its sum. On a CPU the sums become 0, and take no memory."""
        for flat in self._flat:
            heap.release(flat)
        for started in self._started:
            started[:] = [False] * len(started)

    @torch.no_grad()
    def _for_reduction(self) -> Any:
        self._reductions += 1
        for sums, started in zip(self._sums, self._started, strict=True):
            for total, has_gradient in zip(sums, started, strict=True):
                if not has_gradient:
                    total.zero_()
        return self._of_reduction()

"""Master weights and moments of a DeepSpeed optimizer, unpartitioned and by name, for checkpoints.

Uses DeepSpeed's accessors. They need three things that DeepSpeed doesn't check: moments must exist before they are
linked, must be linked again for every group after the first, and need their step set in every group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import nn

from moe.engine.base import ADAM_MOMENTS, MOMENTUM, States
from moe.engine.deepspeed.borrowed import borrow, borrow_value
from moe.engine.parameters import moments_of, trained_parameters, zero_states


class ZeroOptimizerState:
    """The state of `zero`, a ZeRO-1/2 optimizer or BF16_Optimizer, for its model's parameters; Muon updates those named
    `muon`."""

    def __init__(self, model: nn.Module, zero: Any, muon: set[str]) -> None:
        self._model, self._zero, self._muon = model, zero, muon

    def moments(self, name: str) -> tuple[str, ...]:
        """Which of MOMENTS the parameter has."""
        return moments_of(name, self._muon)

    def sizes(self) -> dict[str, int]:
        """{parameter name: elements of this rank's tensor}, in an order that all ranks share."""
        return {name: parameter.numel() for name, parameter in trained_parameters(self._model).items()}

    def gather(self, keep: set[tuple[str, str]] | None = None) -> States:
        """A collective that gathers one tensor at a time; a rank keeps only the (kind, name) in `keep` (None: all)."""
        self._link_moments()
        states: States = {}
        for name, parameter in trained_parameters(self._model).items():
            for kind in ("weights", *self.moments(name)):
                if kind == "weights":
                    value = safe_get_full_fp32_param(parameter)
                else:
                    value = safe_get_full_optimizer_state(parameter, kind)
                if value is None:
                    raise RuntimeError(f"DeepSpeed has no {kind} of {name}: its optimizer states were not linked")
                if keep is None or (kind, name) in keep:
                    states.setdefault(kind, {})[name] = value.detach().cpu()
        return states

    def empty(self, max_bytes: int) -> Iterator[States]:
        """Yields zeros for a reader to overwrite, only for parameters of which this rank's partition has a piece. Each
        part has one parameter, or several of at most `max_bytes` together."""
        # `_hp_mapping` is DeepSpeed's own attribute.
        mine = {name: p for name, p in trained_parameters(self._model).items() if getattr(p, "_hp_mapping") is not None}  # noqa: B009
        return zero_states(mine, self.moments, max_bytes)

    def fill(self, parts: Iterable[States], adam_steps: int) -> None:
        """Loads the parts of `empty`, which a reader has filled, into this rank's partition; call before the first step
        and follow it with `Engine.resumed`. `adam_steps` is the number of updates applied so far."""
        self._link_moments(adam_steps)
        parameters = trained_parameters(self._model)
        for part in parts:
            for name, value in part["weights"].items():
                device = parameters[name].device
                safe_set_full_fp32_param(parameters[name], value.to(device))
                for moment in self.moments(name):
                    safe_set_full_optimizer_state(parameters[name], part[moment][name].to(device), moment)

    def _link_moments(self, adam_steps: int | None = None) -> None:
        """Makes the moments accessible. Missing ones are created as zeros, since DeepSpeed's accessors would hang
        without them. If `adam_steps` is given, all are reset to zero and their step count is set to it."""
        optimizer = self._zero.optimizer
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                slot = optimizer.state[parameter]
                if adam_steps is not None or not slot:
                    slot["step"] = torch.tensor(float(adam_steps or 0), device=parameter.device)
                    for moment in (MOMENTUM,) if group["muon"] else ADAM_MOMENTS:
                        slot[moment] = torch.zeros_like(parameter)
        # NOTE: DeepSpeed links optimizer states after its first group only; relinking covers the experts' groups.
        lost = "moments could not be read or written"
        borrow_value(self._zero, "_hp_optimizer_states_linked", lost=lost)
        self._zero._hp_optimizer_states_linked = False
        borrow(self._zero, "_lazy_init_hp_params_optimizer_state", lost=lost)()

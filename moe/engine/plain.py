"""One process, torch alone: the reference that the exactness tests compare DeepSpeed with, and a fast start for small
runs.

In float32 the optimizer's weights are the model's. In bfloat16 the model has bfloat16 weights; the optimizer has
float32 ones, which start from the rounded weights, and sums gradients in float32: each micro-batch's gradient is added
and freed as soon as autograd has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from moe.config import Config, Precision
from moe.distributed.mesh import Mesh
from moe.engine.base import ADAM_MOMENTS, KINDS, OptimizerState, SkipReason, States, StepResult
from moe.engine.parameters import expert_names, parameter_groups, trained_parameters, zero_states


class PlainEngine:
    """`moe.engine.base.Engine` on a mesh of one rank."""

    def __init__(self, model: nn.Module, config: Config, mesh: Mesh) -> None:
        assert mesh.world_size == 1, "Config.check_world allows one rank"
        self.mesh = mesh
        self.accumulation = config.accumulation(mesh.data_parallel_size)
        self.expert_names = expert_names(model)
        self.skipped_steps = 0
        self.model = model
        self._max_grad_norm = config.optim.max_grad_norm
        if config.train.precision is Precision.bfloat16:
            model.bfloat16()
        self._trained = trained_parameters(model)
        self._masters: dict[str, Tensor] = dict(self._trained)
        groups = parameter_groups(model, config.optim.weight_decay)
        if config.train.precision is Precision.bfloat16:
            self._masters = {name: _float32_master(parameter) for name, parameter in self._trained.items()}
            master_of = {parameter: self._masters[name] for name, parameter in self._trained.items()}
            for group in groups:
                group["params"] = [master_of[parameter] for parameter in group["params"]]
        self._optimizer = torch.optim.AdamW(
            groups,
            lr=config.optim.lr,
            betas=(config.optim.betas[0], config.optim.betas[1]),
            eps=config.optim.eps,
            fused=True,
        )
        self.optimizer_state: OptimizerState = PlainOptimizerState(self._trained, self._masters, self._optimizer)
        self._micro_batches = 0
        self._losses_finite = torch.tensor(True, device=mesh.device)

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """The model's forward pass, for training."""
        return self.model(*inputs, **keywords)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's loss. A loss that isn't finite makes `step` skip the step."""
        self._losses_finite = self._losses_finite & loss.detach().isfinite()  # read in `step`: no wait for a GPU here
        (loss / self.accumulation).backward()

    def step(self, lr: float, norm_limit: float | None = None) -> StepResult | None:
        """Ends a micro-batch; on the step's last one updates the weights with learning rate `lr`, unless a loss or a
        gradient was not finite or the gradient norm is over `norm_limit`."""
        self._micro_batches += 1
        if self._micro_batches % self.accumulation:
            return None
        masters = list(self._masters.values())
        for master in masters:
            if master.grad is None:  # no loss depended on it: its gradient is zero, as in every other engine
                master.grad = torch.zeros_like(master)
        total_norm = get_total_norm([master.grad for master in masters if master.grad is not None])
        grad_norm = float(torch.where(self._losses_finite, total_norm, math.nan))
        skipped = None
        if not math.isfinite(grad_norm):
            grad_norm, skipped = math.nan, SkipReason.not_finite
        elif norm_limit is not None and grad_norm > norm_limit:
            skipped = SkipReason.spike
        if skipped is None:
            self._update(masters, total_norm, grad_norm, lr)
        else:
            self.skipped_steps += 1
        self._optimizer.zero_grad(set_to_none=True)
        self._losses_finite = torch.ones_like(self._losses_finite)
        return StepResult(grad_norm, skipped)

    def resumed(self, steps: int, skipped_steps: int) -> None:
        """After `optimizer_state.fill`: the model gets the new weights, the counters go on."""
        del steps  # Adam's own count is in the optimizer's state
        self._copy_to_model()
        self.skipped_steps = skipped_steps

    def _update(self, masters: list[Tensor], total_norm: Tensor, grad_norm: float, lr: float) -> None:
        if grad_norm + 1e-6 > self._max_grad_norm:  # below, clipping would multiply by 1
            clip_grads_with_norm_(masters, self._max_grad_norm, total_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._copy_to_model()

    @torch.no_grad()
    def _copy_to_model(self) -> None:
        for name, parameter in self._trained.items():
            if self._masters[name] is not parameter:
                parameter.copy_(self._masters[name])


def _float32_master(parameter: nn.Parameter) -> Tensor:
    """The parameter in float32; its `grad` is the sum of the parameter's gradients, which are freed at once."""
    master = parameter.detach().float()

    def add_gradient(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(add_gradient)
    return master


class PlainOptimizerState:
    """`moe.engine.base.OptimizerState` of one torch AdamW over `masters`, the float32 weights of `trained`."""

    def __init__(
        self, trained: dict[str, nn.Parameter], masters: dict[str, Tensor], optimizer: torch.optim.AdamW
    ) -> None:
        self._trained, self._masters, self._optimizer = trained, masters, optimizer

    def sizes(self) -> dict[str, int]:
        """{parameter name: elements}."""
        return {name: parameter.numel() for name, parameter in self._trained.items()}

    def gather(self, keep: set[tuple[str, str]] | None = None) -> States:
        """Copies of the (kind, name) in `keep` (None: all); moments are zero before the first update."""
        states: States = {kind: {} for kind in KINDS}
        for name, master in self._masters.items():
            moments = self._optimizer.state.get(master, {})
            for kind in KINDS:
                if keep is None or (kind, name) in keep:
                    value = master if kind == "weights" else moments.get(kind)
                    states[kind][name] = (
                        torch.zeros(master.shape) if value is None else value.detach().to("cpu", copy=True).contiguous()
                    )
        return states

    def empty(self, max_bytes: int) -> Iterator[States]:
        """Zeros for a reader to fill: part by part, each of one parameter or of at most `max_bytes`."""
        return zero_states(self._trained, max_bytes)

    @torch.no_grad()
    def fill(self, parts: Iterable[States], adam_steps: int) -> None:
        """Take `empty`'s parts, filled, before the first step; `adam_steps` counts applied updates. `Engine.resumed`
        must follow."""
        for part in parts:
            for name, value in part["weights"].items():
                master = self._masters[name]
                master.copy_(value)
                self._optimizer.state[master] = {
                    "step": torch.tensor(float(adam_steps), device=master.device),
                    **{moment: torch.empty_like(master).copy_(part[moment][name]) for moment in ADAM_MOMENTS},
                }

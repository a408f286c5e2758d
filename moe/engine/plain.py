"""One process, without DeepSpeed: the reference that the exactness tests compare DeepSpeed with, and a fast start for
small runs.

In float32 the optimizer updates the model's weights directly. In bfloat16 the model has bfloat16 weights and the
optimizer float32 master weights, initialised from the rounded ones. Gradients are then summed in float32: each
micro-batch's gradient is added and freed as soon as autograd has computed it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from moe.config import Config, Precision
from moe.distributed.mesh import Mesh
from moe.engine.base import NO_SCALES, OptimizerState, SkipReason, States, StepResult
from moe.engine.muon import Muon, OwnMatrices
from moe.engine.optimizers import make_optimizer
from moe.engine.parameters import (
    expert_names,
    moments_of,
    muon_shapes,
    parameter_groups,
    set_learning_rates,
    trained_parameters,
    zero_states,
)


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
        groups = parameter_groups(model, config)
        if config.train.precision is Precision.bfloat16:
            self._masters = {name: _float32_master(parameter) for name, parameter in self._trained.items()}
            master_of = {parameter: self._masters[name] for name, parameter in self._trained.items()}
            for group in groups:
                group["params"] = [master_of[parameter] for parameter in group["params"]]
        self._optimizer, shapes = make_optimizer(groups, config, mesh.device), muon_shapes(model, config)
        if isinstance(self._optimizer, Muon):
            for name, shape in shapes.items():
                self._optimizer.matrices[self._masters[name]] = OwnMatrices(self._masters[name], shape)
        self.optimizer_state: OptimizerState = PlainOptimizerState(
            self._trained, self._masters, self._optimizer, set(shapes)
        )
        self._micro_batches = 0
        self._losses_finite = torch.tensor(True, device=mesh.device)

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """The model's forward pass, for training."""
        return self.model(*inputs, **keywords)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of one micro-batch's loss. A loss that isn't finite makes `step` skip the update."""
        self._losses_finite = self._losses_finite & loss.detach().isfinite()  # read in `step`, not to wait for a GPU
        (loss / self.accumulation).backward()

    def step(
        self, lr: float, norm_limit: float | None = None, lr_scales: Mapping[str, float] = NO_SCALES
    ) -> StepResult | None:
        """Ends a micro-batch; the step's last call updates the weights with learning rate `lr`, times the scales of
        its parameters' roles, unless a loss or a gradient was not finite or the gradient norm is over `norm_limit`."""
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
            set_learning_rates(self._optimizer.param_groups, lr, lr_scales)
            self._update(masters, total_norm, grad_norm)
        else:
            self.skipped_steps += 1
        self._optimizer.zero_grad(set_to_none=True)
        self._losses_finite = torch.ones_like(self._losses_finite)
        return StepResult(grad_norm, skipped)

    def resumed(self, steps: int, skipped_steps: int) -> None:
        """Call after `optimizer_state.fill`: copies the weights to the model and sets the counter of skipped steps."""
        del steps  # the optimizer's state has Adam's own count
        self._copy_to_model()
        self.skipped_steps = skipped_steps

    def _update(self, masters: list[Tensor], total_norm: Tensor, grad_norm: float) -> None:
        if grad_norm + 1e-6 > self._max_grad_norm:  # below, clipping would multiply by 1
            clip_grads_with_norm_(masters, self._max_grad_norm, total_norm)
        self._optimizer.step()
        self._copy_to_model()

    @torch.no_grad()
    def _copy_to_model(self) -> None:
        for name, parameter in self._trained.items():
            if self._masters[name] is not parameter:
                parameter.copy_(self._masters[name])


def _float32_master(parameter: nn.Parameter) -> Tensor:
    """A float32 copy of the parameter, whose `grad` sums the parameter's gradients; those are freed at once."""
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
    """`moe.engine.base.OptimizerState` of one optimizer over `masters`, the float32 weights of `trained`; Muon updates
    those named `muon`."""

    def __init__(
        self,
        trained: dict[str, nn.Parameter],
        masters: dict[str, Tensor],
        optimizer: torch.optim.AdamW,
        muon: set[str],
    ) -> None:
        self._trained, self._masters, self._optimizer, self._muon = trained, masters, optimizer, muon

    def moments(self, name: str) -> tuple[str, ...]:
        """Which of MOMENTS the parameter has."""
        return moments_of(name, self._muon)

    def sizes(self) -> dict[str, int]:
        """{parameter name: elements}."""
        return {name: parameter.numel() for name, parameter in self._trained.items()}

    def gather(self, keep: set[tuple[str, str]] | None = None) -> States:
        """Copies of the (kind, name) in `keep` (None: all); moments are zero before the first update."""
        states: States = {}
        for name, master in self._masters.items():
            moments = self._optimizer.state.get(master, {})
            for kind in ("weights", *self.moments(name)):
                if keep is None or (kind, name) in keep:
                    value = master if kind == "weights" else moments.get(kind)
                    states.setdefault(kind, {})[name] = (
                        torch.zeros(master.shape) if value is None else value.detach().to("cpu", copy=True).contiguous()
                    )
        return states

    def empty(self, max_bytes: int) -> Iterator[States]:
        """Yields zeros for a reader to overwrite. Each part has one parameter, or several of at most `max_bytes`."""
        return zero_states(self._trained, self.moments, max_bytes)

    @torch.no_grad()
    def fill(self, parts: Iterable[States], adam_steps: int) -> None:
        """Loads the parts of `empty` once a reader has filled them; call before the first step and follow it with
        `Engine.resumed`. `adam_steps` is the number of updates applied so far."""
        for part in parts:
            for name, value in part["weights"].items():
                master = self._masters[name]
                master.copy_(value)
                self._optimizer.state[master] = {
                    "step": torch.tensor(float(adam_steps), device=master.device),
                    **{moment: torch.empty_like(master).copy_(part[moment][name]) for moment in self.moments(name)},
                }

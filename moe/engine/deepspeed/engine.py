"""The adapter to DeepSpeed. Its version is pinned; tests/distributed/test_engine.py tests what follows.

- DeepSpeed treats a parameter as an expert's if `param.allreduce is False` and it has a `group_name`, but enables its
  expert code only if the model contains an instance of its own `MoE` module. `_ExpertMarker` is that instance: it has
  no parameters and no forward pass, so that our sparse layer doesn't depend on DeepSpeed.
- Expert gradients are summed over the ranks that hold copies of the same experts and divided by the *full*
  data-parallel size, so the loss needs no scaling for expert parallelism.
- `engine.backward` divides by the accumulation steps and the reduction averages over ranks: the caller passes losses
  whose mean over all micro-batches of the step is the step's loss.
- A step whose loss or gradient is not finite on any rank is skipped on all of them: `backward` makes the gradients of
  such a loss NaN, and DeepSpeed's optimizers skip an update that isn't finite. moe/engine/deepspeed/skip.py also makes
  them skip an update over a norm limit.
- Without `communication_data_type: fp32`, bf16 gradients are reduced in bf16; without an explicit
  `gradient_clipping`, DeepSpeed clips at 1.0.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import deepspeed
import deepspeed.comm
import deepspeed.ops
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import groups
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from moe.config import Config, OptimizerKind, Precision
from moe.distributed.mesh import Mesh
from moe.engine.adamw import AdamW
from moe.engine.base import NO_SCALES, OptimizerState, SkipReason, StepResult
from moe.engine.deepspeed.bfloat16_shortcuts import BFloat16Shortcuts
from moe.engine.deepspeed.borrowed import borrow, check_version, require_meaning
from moe.engine.deepspeed.lean_imports import import_muon_uncompiled, import_ops_without_triton
from moe.engine.deepspeed.muon import share_matrices
from moe.engine.deepspeed.optimizer_state import ZeroOptimizerState
from moe.engine.deepspeed.shortcuts import Shortcuts
from moe.engine.deepspeed.skip import NormLimit
from moe.engine.muon import Muon
from moe.engine.optimizers import make_optimizer
from moe.engine.parameters import (
    expert_names,
    muon_shapes,
    parameter_groups,
    set_learning_rates,
    trained_parameters,
)
from moe.errors import UserError

# The pinned DeepSpeed calls collectives by deprecated names; users can't change that.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)

SMALL_GRADIENT = 1 << 20  # elements; gradients up to this size are reduced together, in a bucket


class _ExpertMarker(MoE):
    """Tells DeepSpeed that the model has expert-parallel parameters (see the module's docstring)."""

    def __init__(self, num_experts: int, expert: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts
        self.ep_size = expert
        self.expert_group_name = _group_name(expert)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        del use_data_before_expert_parallel_  # `prepare` has created the groups


def _group_name(expert: int) -> str:
    return f"ep_size_{expert}"


def prepare(mesh: Mesh) -> Mesh:
    """The mesh with its expert group of consecutive ranks, so that exchanges stay within a node if they can."""
    deepspeed_logger.setLevel(logging.WARNING)
    deepspeed_logger.addFilter(_worth_reading)
    bf16_optimizer.see_memory_usage = _say_nothing  # DeepSpeed's prints three lines at each point of the start
    check_version()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it, even in a single process
    if AdamW not in ZERO_SUPPORTED_OPTIMIZERS:  # it has torch's; the type itself is compared
        ZERO_SUPPORTED_OPTIMIZERS.append(AdamW)
    # NOTE: disables DeepSpeed's shared-memory collectives: they are compiled at first use (45 s, needs a compiler) and
    # sum in another order than gloo. The whole table is replaced because setting one entry makes DeepSpeed probe every
    # op with compiler subprocesses, and so does looking whether it is there.
    borrow(deepspeed.ops, "_probe_compatible_ops", lost="an op would be compiled at start-up, and sum otherwise")
    setattr(deepspeed.ops, "__compatible_ops__", {"deepspeed_shm_comm": False})  # noqa: B010  # unknown to its stubs
    deepspeed.comm.init_distributed(dist_init_required=False, verbose=False)
    if mesh.expert_parallel_size == 1:
        return mesh
    name = _group_name(mesh.expert_parallel_size)
    lost = "experts would have no process groups"
    known = borrow(groups, "_get_expert_parallel_group_dict", lost=lost)
    create = borrow(
        groups, "_create_expert_and_data_parallel", "expert_parallel_size_", "mp_size", "pp_size", "mp_mode",
        "use_data_before_expert_parallel_", "folding_spec", lost=lost,
    )  # fmt: skip
    if name not in known():
        create(mesh.expert_parallel_size)
    return replace(mesh, expert_group=borrow(groups, "_get_expert_parallel_group", "group_name", lost=lost)(name))


def _say_nothing(message: str, force: bool = False) -> None:
    """In place of DeepSpeed's `see_memory_usage`."""


def _worth_reading(record: logging.LogRecord) -> bool:
    """Drops DeepSpeed's message that calls every skipped step an overflow, since moe.train.guard logs the real reason,
    and its warning of optimizers that it doesn't know: tests/distributed/test_engine.py tests Muon."""
    return not any(text in record.getMessage() for text in ("OVERFLOW!", "untested optimizer"))


def _deepspeed_config(config: Config, mesh: Mesh) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation(mesh.data_parallel_size),
        "gradient_clipping": config.optim.max_grad_norm,
        "communication_data_type": "fp32",
        # Expert-parallel parameters need contiguous gradients and reduce-scatter in both stages.
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": False,
        },
        "steps_per_print": 10**9,
    }
    if _takes_shortcuts(config, mesh) and _reduces_in_place(config):
        # Saves two copies of every gradient: gradients larger than a bucket are reduced in place.
        settings["zero_optimization"] |= {"contiguous_gradients": False, "reduce_bucket_size": SMALL_GRADIENT}
    if config.parallel.offload_optimizer:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        settings["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW steps on the host instead of a compiled one
    if config.optim.kind is OptimizerKind.muon:
        settings["zero_allow_untested_optimizer"] = True
    if config.train.precision is Precision.bfloat16:
        # NOTE: without immediate_grad_update BF16_Optimizer clears gradients in a hook on the model's outputs, which
        # DeepSpeed doesn't find inside a dataclass: the first of M micro-batches would count M times, the last once.
        # With it each gradient is added to its float32 sum and freed as soon as autograd has computed it.
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _takes_shortcuts(config: Config, mesh: Mesh) -> bool:
    """On a CPU, where they were measured. In bfloat16 on a GPU too, where they leave out the same passes over memory,
    and one rank's reduction with itself; they have not run there yet."""
    return mesh.device.type == "cpu" or config.train.precision is Precision.bfloat16


def _reduces_in_place(config: Config) -> bool:
    parallel, float32 = config.parallel, config.train.precision is Precision.float32
    return float32 and parallel.zero_stage == 1 and parallel.expert_parallel_size == 1


class DeepSpeedEngine:
    """`moe.engine.base.Engine` with ZeRO-1 or 2. Raises UserError for `parallel.offload_optimizer` on a CPU."""

    def __init__(self, model: nn.Module, config: Config, mesh: Mesh) -> None:
        if config.parallel.offload_optimizer and mesh.device.type == "cpu":
            raise UserError(
                "parallel.offload_optimizer=true needs a CUDA device: on a CPU the optimizer is in the host's memory"
            )
        self.mesh = mesh
        self.accumulation = config.accumulation(mesh.data_parallel_size)
        self.expert_names = expert_names(model)
        param_groups = parameter_groups(model, config)
        experts_train = any(model.get_parameter(name).requires_grad for name in self.expert_names)
        if mesh.expert_parallel_size > 1:
            for name, parameter in model.named_parameters():
                if name in self.expert_names:
                    setattr(parameter, "allreduce", False)  # noqa: B010  # DeepSpeed's own attributes
                    setattr(parameter, "group_name", _group_name(mesh.expert_parallel_size))  # noqa: B010
            if experts_train:
                model.add_module("expert_marker", _ExpertMarker(config.router.num_experts, mesh.expert_parallel_size))
            param_groups = split_params_into_different_moe_groups_for_optimizer(param_groups)
        filled = [group for group in param_groups if group["params"]]  # DeepSpeed fails on an empty group
        optimizer, shapes = make_optimizer(filled, config, mesh.device), muon_shapes(model, config)
        import_muon_uncompiled()
        if mesh.device.type == "cpu":
            import_ops_without_triton()
        engine, zero, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=_deepspeed_config(config, mesh),
            dist_init_required=False,
        )
        # Any: DeepSpeed's annotation is a union of all its engines and optimizers.
        self._engine: Any = engine
        self._zero: Any = zero
        assert self._engine.has_moe_layers == (mesh.expert_parallel_size > 1 and experts_train)
        if isinstance(optimizer, Muon):
            share_matrices(optimizer, zero, trained_parameters(model), shapes)
        self._shortcuts: Shortcuts | BFloat16Shortcuts | None = None
        if _takes_shortcuts(config, mesh):
            if config.train.precision is Precision.float32:
                self._shortcuts = Shortcuts(self._zero, mesh.world_size)
            elif isinstance(self._zero, bf16_optimizer.BF16_Optimizer):
                self._shortcuts = BFloat16Shortcuts(self._engine, self._zero, mesh.world_size)
        self._norm = NormLimit(self._zero, mesh)
        borrow(self._zero, "update_lp_params", lost="the model would compute with old weights after a resume")
        borrow(self._engine, "was_step_applied", lost="skipped steps would count as applied")
        self.optimizer_state: OptimizerState = ZeroOptimizerState(self._engine.module, zero, set(shapes))
        self._backwards = 0

    @property
    def model(self) -> nn.Module:
        return self._engine.module

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps skipped, on all ranks together."""
        return int(self._engine.skipped_steps)

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """The model's forward pass, for training."""
        return self._engine(*inputs, **keywords)

    def backward(self, loss: Tensor) -> None:
        # Multiplying by 1 leaves the loss unchanged. Multiplying by NaN makes this rank's gradients NaN, so all ranks
        # skip the step.
        self._engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))

    def step(
        self, lr: float, norm_limit: float | None = None, lr_scales: Mapping[str, float] = NO_SCALES
    ) -> StepResult | None:
        """Ends a micro-batch; the step's last call updates the weights with learning rate `lr`, times the scales of
        its parameters' roles.

        The update is skipped on all ranks if a loss or a gradient was not finite on any of them, or if the gradient
        norm is over `norm_limit` (None, on all ranks, for no limit).
        """
        self._norm.begin_step(norm_limit)
        if self._shortcuts is not None:
            self._shortcuts.begin_step()
        set_learning_rates(self._zero.param_groups, lr, lr_scales)
        self._backwards += 1
        self._engine.step()
        if self._backwards % self.accumulation:
            return None
        norm, skipped, applied = self._norm.norm, None, self._engine.was_step_applied()
        require_meaning(self._norm.asked or not applied, "ask for the gradient norm before an update")
        require_meaning(not (applied and self._norm.skips), "skip a step whose norm is −1 or whose clipping raised")
        if self._shortcuts is not None:
            self._shortcuts.end_update(applied)
        if not applied:
            skipped = SkipReason.not_finite if math.isnan(norm) else SkipReason.spike
        return StepResult(norm, skipped)

    def resumed(self, steps: int, skipped_steps: int) -> None:
        """Call after `optimizer_state.fill` on all ranks: copies the weights to the model. A collective."""
        self._zero.update_lp_params()  # NOTE: without it the model would silently compute with its old weights
        self._engine.global_steps = steps
        self._engine.skipped_steps = skipped_steps

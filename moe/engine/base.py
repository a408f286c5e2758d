"""What training needs of an engine: gradients, an update, and the optimizer's state by parameter name.

`tests/distributed/test_engine_contract.py` tests every engine against this contract.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor, nn

from moe.distributed.mesh import Mesh

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENTUM = "momentum_buffer"  # Muon's, as torch.optim names it
MOMENTS = (*ADAM_MOMENTS, MOMENTUM)
ROUTER, EXPERTS = "router", "experts"  # parameters that may have learning rates of their own
NO_SCALES: Mapping[str, float] = MappingProxyType({})
States = dict[str, dict[str, Tensor]]  # {kind: {parameter name: float32 tensor on the CPU}}; experts: this rank's slice


class SkipReason(Enum):
    """Why a step was skipped: a loss or a gradient was not finite, or the gradient norm was over the limit."""

    not_finite = "not finite"
    spike = "spike"


@dataclass(frozen=True, slots=True)
class StepResult:
    """`grad_norm` is the norm over all parameters before clipping, NaN when it is not finite.

    `skipped`: why no rank changed its weights, moments or Adam steps; None when the update was applied.
    """

    grad_norm: float
    skipped: SkipReason | None


class OptimizerState(Protocol):
    """Float32 weights and moments of the trained parameters, unpartitioned and by name, for checkpoints.

    Frozen parameters (`requires_grad=False`) are left out: no step changes them.
    """

    def moments(self, name: str) -> tuple[str, ...]:
        """Which of MOMENTS the parameter has: Adam's, or Muon's momentum."""
        ...

    def sizes(self) -> dict[str, int]:
        """{parameter name: elements of this rank's tensor}, in an order that all ranks share."""
        ...

    def gather(self, keep: set[tuple[str, str]] | None = None) -> States:
        """A collective that gathers one tensor at a time; a rank keeps only the (kind, name) in `keep` (None: all)."""
        ...

    def empty(self, max_bytes: int) -> Iterator[States]:
        """Yields zeros for a reader to overwrite, only for the parameters that this rank needs. Each part has one
        parameter, or several of at most `max_bytes` together."""
        ...

    def fill(self, parts: Iterable[States], adam_steps: int) -> None:
        """Loads the parts of `empty` once a reader has filled them; call before the first step and follow it with
        `Engine.resumed`. `adam_steps` is the number of updates applied so far."""
        ...


class Engine(Protocol):
    """Precision, gradient accumulation, clipping, reduction over ranks and the optimizer around one model.

    For each of the `accumulation` micro-batches of an optimizer step call `backward(loss)`, then `step(lr)`. The last
    `step` returns a `StepResult`, the others None. The gradient is the mean over all micro-batches of all ranks.
    """

    mesh: Mesh
    accumulation: int
    expert_names: set[str]  # parameters of which each rank of an expert group holds its own slice
    optimizer_state: OptimizerState

    @property
    def model(self) -> nn.Module: ...

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps skipped, on all ranks together."""
        ...

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """The model's forward pass, for training."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of one micro-batch's loss. A loss that isn't finite makes every rank skip the step."""
        ...

    def step(
        self, lr: float, norm_limit: float | None = None, lr_scales: Mapping[str, float] = NO_SCALES
    ) -> StepResult | None:
        """Ends a micro-batch; the step's last call updates the weights with learning rate `lr`, times `lr_scales`'
        factor for ROUTER or EXPERTS; 0 leaves weights as they are.

        The update is skipped on all ranks if a loss or a gradient was not finite on any of them, or if the gradient
        norm is over `norm_limit` (None, on all ranks, for no limit).
        """
        ...

    def resumed(self, steps: int, skipped_steps: int) -> None:
        """Call after `optimizer_state.fill` on all ranks: copies the weights to the model. A collective."""
        ...

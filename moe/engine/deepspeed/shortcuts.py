"""Removes work that DeepSpeed's ZeRO-1/2 does at every step and a float32 run doesn't need: a sixth of a small model's
step on a CPU, where every pass over the gradients takes time. Results are the same
(tests/distributed/test_shortcuts.py).

- DeepSpeed keeps float32 master weights beside float32 model weights and copies them after every update. Here the
  master partition is a view of the model's weights: saves a pass, and 4 bytes per parameter of the partition.
- DeepSpeed computes the gradient norm from a float64 copy of each gradient. Here a large gradient's rows are summed in
  float32 and the row sums in float64: no copy, and a relative error of about 1e-8, since the rows' rounding errors
  average out.
- DeepSpeed copies the gradients into one flat tensor for AdamW, then scales it for clipping in another pass. Here
  AdamW reads the gradients where they are, with the parts of the weights and moments that belong to each: saves a pass,
  and 4 bytes per parameter of the partition. They are scaled in place if the norm is over the limit.
- On one rank, DeepSpeed divides gradients by 1. Here it doesn't.

Only for float32 on a CPU, where it was measured. With bfloat16 DeepSpeed uses other classes and buffers:
`bfloat16_shortcuts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from moe.engine.adamw import AdamW
from moe.engine.deepspeed.borrowed import borrow, borrow_value, require_meaning

ROW = 1024  # elements summed in float32
LARGE = 1 << 18  # elements; below this a float64 copy costs next to nothing


class Shortcuts:
    """Patches a new ZeRO-1/2 optimizer of a float32 model, before its first step."""

    def __init__(self, zero: Any, world_size: int) -> None:
        clip = "gradients would not be clipped"
        borrow(zero, "get_grad_norm_direct", "gradients", "params", "norm_type", lost="the norm would be another")
        borrow(zero, "_get_preflattened_grad_partition", "group_idx", lost=clip)
        borrow(zero, "unscale_and_clip_grads", "grad_groups_flat", "total_norm", lost=clip)
        whole = borrow(zero, "_optimizer_step", "group_no", lost="weights would not be updated")
        borrow_value(zero, "gradient_average", lost="gradients would be scaled")
        for name in ("single_partition_of_fp32_groups", "clip_grad", "averaged_gradients", "dp_process_group"):
            borrow_value(zero, name, lost=clip)
        self._groups = len(zero.single_partition_of_fp32_groups)
        self._passes = 0
        self._updated: list[int] = []
        _share_weights(zero)
        zero.get_grad_norm_direct = _norm_function(zero)
        gradients: dict[int, list[Tensor]] = {}

        def keep_gradients(group_idx: int) -> Tensor:
            """Replaces the flat gradient, of which DeepSpeed checks the size and dtype. Muon needs it."""
            clipped = _clipped(zero, group_idx)
            if zero.optimizer.param_groups[group_idx]["muon"]:
                return torch.cat(clipped)
            gradients[group_idx] = clipped
            master = zero.single_partition_of_fp32_groups[group_idx]
            return master.new_zeros(1).expand(master.numel())

        def already_clipped(grad_groups_flat: list[Tensor], total_norm: Tensor) -> None:
            """Replaces DeepSpeed's pass over the flat gradients."""
            self._passes += 1

        def update(group_no: int) -> None:
            if group_no in gradients:
                _adamw(zero.optimizer, group_no, gradients.pop(group_no))
            else:
                whole(group_no)
            self._updated.append(group_no)

        zero._get_preflattened_grad_partition = keep_gradients
        zero.unscale_and_clip_grads = already_clipped
        zero._optimizer_step = update
        if world_size == 1:
            zero.gradient_average = False

    def begin_step(self) -> None:
        self._updated, self._passes = [], 0

    def end_update(self, applied: bool) -> None:
        """Raises RuntimeError unless, since `begin_step`, an applied update clipped and updated every parameter group
        exactly once."""
        once = sorted(self._updated) == list(range(self._groups)) and self._passes > 0
        require_meaning(not applied or once, "clip, then update, each parameter group once an update")


def _share_weights(zero: Any) -> None:
    lost = "the model's weights would not follow the optimizer's"
    partitions = borrow_value(zero, "parallel_partitioned_bit16_groups", lost=lost)
    process_groups = borrow_value(zero, "real_dp_process_group", lost=lost)
    for index, master in enumerate(zero.single_partition_of_fp32_groups):
        rank = dist.get_rank(group=process_groups[index])
        weights = partitions[index][rank]
        assert weights.dtype == master.dtype
        assert torch.equal(weights, master)
        master.data = weights.data
    # Checkpoints read and write views of the master partition.
    borrow(zero, "_link_all_hp_params", lost="checkpoints would read old weights")()


def squared_norm(gradient: Tensor) -> Tensor:
    """Σ g², a float64 scalar."""
    flat = gradient.detach().reshape(-1)
    if flat.numel() < LARGE:
        return flat.double().square().sum()
    whole = flat.numel() // ROW * ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1).double()
    return rows.square().sum() + flat[whole:].double().square().sum()


def _norm_function(zero: Any) -> Callable[..., Tensor]:
    def norm(gradients: Iterable[Tensor], params: Iterable[Tensor], norm_type: float = 2) -> Tensor:
        """The norm of one parameter group over all ranks, float32; −1 if not finite, which makes `step` skip."""
        del params  # `gradients` has one per parameter, and padding, which is zero
        assert norm_type == 2
        total = torch.stack([squared_norm(gradient) for gradient in gradients]).sum().float()
        dist.all_reduce(total, group=zero.dp_process_group)
        return torch.where(total.isfinite(), total.sqrt(), -1.0)

    return norm


def _clipped(zero: Any, group: int) -> list[Tensor]:
    """This rank's gradients of one group, scaled in place so that the global norm is at most `clip_grad`. They follow
    one another in the partition, padding included."""
    # DeepSpeed's own formula, so that clipped runs agree with it to the bit.
    norm = borrow_value(zero, "_global_grad_norm", lost="gradients would not be clipped")
    scale = 1.0 / torch.clamp((norm + 1e-6) / zero.clip_grad, min=1.0)
    gradients = [gradient.detach().reshape(-1) for gradient in zero.averaged_gradients[group]]
    if scale != 1:
        for gradient in gradients:
            gradient.mul_(scale)
    return gradients


def _adamw(optimizer: Any, group: int, gradients: list[Tensor]) -> None:
    """One update of a parameter group, whose only parameter is the partition, by torch's function for AdamW."""
    assert isinstance(optimizer, AdamW)
    settings = optimizer.param_groups[group]
    (master,) = settings["params"]
    state = optimizer.state[master]
    if not state:  # as AdamW's own first step
        state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
    sizes = [gradient.numel() for gradient in gradients]
    weights, averages, squares = (
        list(tensor.detach().split(sizes)) for tensor in (master, state["exp_avg"], state["exp_avg_sq"])
    )
    steps = [state["step"].clone() for _ in sizes]
    with torch.no_grad():
        adamw(
            weights, gradients, averages, squares, [], steps, fused=True,
            amsgrad=settings["amsgrad"], maximize=settings["maximize"], beta1=settings["betas"][0],
            beta2=settings["betas"][1], lr=settings["lr"], weight_decay=settings["weight_decay"], eps=settings["eps"],
        )  # fmt: skip
    state["step"].copy_(steps[0])

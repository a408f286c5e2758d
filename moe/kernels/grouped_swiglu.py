"""The SwiGLU of many experts, y = (silu(x Wgᵀ) ⊙ (x Wuᵀ)) Wdᵀ row by row, each row with its expert's weights.

`resolve_backend` picks the back-end; `loop_ffn` is the plain reference; the autograd functions of the others are in
`expert_swiglu`.

Shapes: T tokens, N rows sorted by expert, H hidden, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.config import ExpertBackend, ExpertsConfig
from moe.errors import UserError
from moe.kernels import megablocks
from moe.kernels.expert_swiglu import GroupedSwiGLU, PerExpertSwiGLU
from moe.kernels.float8_products import float8_products
from moe.kernels.grouped_products import torch_products
from moe.kernels.permute import Combination, combine_rows, gather_rows
from moe.kernels.policy import runs_fused


def resolve_backend(
    config: ExpertsConfig, device: torch.device, dtype: torch.dtype, shapes: tuple[int, int]
) -> tuple[ExpertBackend, str]:
    """The back-end that will run, and why, for the start-up log; `shapes` is (hidden_size, intermediate_size).

    `auto` picks grouped_mm if it can run here, else the loop. Raises UserError with the reason when `experts.backend`
    names one that can't run here.
    """
    asked = config.backend
    if asked is ExpertBackend.loop:
        return asked, "set by experts.backend"
    if asked is ExpertBackend.megablocks:
        megablocks.require(device, dtype)
        return asked, "set by experts.backend"
    obstacle = _grouped_mm_obstacle(device, dtype, shapes)
    if obstacle is None:
        how = "torch's grouped_mm" if device.type == "cuda" else "one product per expert, as torch's grouped_mm on CPU"
        return ExpertBackend.grouped_mm, how
    if asked is ExpertBackend.grouped_mm:
        raise UserError(f"experts.backend=grouped_mm {obstacle}; use experts.backend=auto or loop")
    return ExpertBackend.loop, f"grouped_mm {obstacle}"


def _grouped_mm_obstacle(device: torch.device, dtype: torch.dtype, shapes: tuple[int, int]) -> str | None:
    """Why grouped_mm can't run, or None if it can. On a CPU it always can."""
    if device.type != "cuda":
        return None
    if dtype is not torch.bfloat16:
        return f"must have bfloat16 rows on CUDA, not {str(dtype).removeprefix('torch.')}"
    if any(size * dtype.itemsize % 16 for size in shapes):
        return f"must have 16-byte aligned rows: hidden and intermediate size {shapes} must be multiples of 8"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "must have a GPU of compute capability 8.0 or newer"
    return None


def grouped_ffn(
    x: Tensor,
    counts_E: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    backend: ExpertBackend,
    combination: Combination | None = None,
    *,
    fp8: bool = False,
) -> Tensor:
    """down(silu(gate(x)) · up(x)) of each row's expert; x [N, H] sorted by expert, N = counts_E.sum().

    With a `combination` x is [T, H], and the result each token's sum of its rows' results by weight, [T, H]: rows are
    copied, computed and summed up in one function, which keeps neither the copies nor the rows' results for the
    backward pass (but for the loop).

    With `fp8` the products of rows and weights have float8 factors (`float8_products`); ValueError with another
    back-end than grouped_mm.

    On CUDA the loop and megablocks read the counts on the host, which waits for the device once per call; grouped_mm
    doesn't wait (its backward pass without Triton waits for the counts' copy, which the forward pass started).
    """
    if fp8 and backend is not ExpertBackend.grouped_mm:
        raise ValueError(f"float8 factors need experts.backend=grouped_mm, not {backend.name}")
    weights_TK, order = combination or (None, None)
    if backend is ExpertBackend.loop:
        if weights_TK is None or order is None:
            return loop_ffn(x, counts_E.tolist(), gate_up_proj, down_proj)
        y_NH = loop_ffn(gather_rows(x, order), counts_E.tolist(), gate_up_proj, down_proj)
        return combine_rows(y_NH, weights_TK, order)
    rows = x.shape[0] if order is None else order.tokens_N.shape[0]
    if x.device.type != "cuda" or rows == 0:
        counts = counts_E.tolist() if rows else [0] * counts_E.numel()
        return PerExpertSwiGLU.apply(x, gate_up_proj, down_proj, counts, weights_TK, order, fp8)  # type: ignore[return-value]
    if backend is ExpertBackend.megablocks:
        known = counts_E.tolist()
        counts, products = (lambda: known), megablocks.products(known)
    else:
        counts = counts_E if runs_fused(x) else LateCounts(counts_E)
        products = float8_products(counts_E) if fp8 else torch_products(counts_E)
    return GroupedSwiGLU.apply(x, gate_up_proj, down_proj, counts, products, weights_TK, order)  # type: ignore[return-value]


def loop_ffn(x_NH: Tensor, counts: list[int], gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """The reference: one plain SwiGLU per expert, any dtype, device and shape, with autograd's own backward pass."""
    outputs = []
    for rows_H, gate_up, down in zip(x_NH.split(counts), gate_up_proj, down_proj, strict=True):
        gate_F, up_F = F.linear(rows_H, gate_up).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate_F) * up_F, down))
    return torch.cat(outputs)


class LateCounts:
    """Copies counts from CUDA to the host without making the forward pass wait; calling it returns them.

    The backward pass calls it. It waits for the copy only, not for the work queued behind it, so the GPU stays busy.
    """

    def __init__(self, counts_E: Tensor) -> None:
        self._counts_E = counts_E.to("cpu", non_blocking=True)  # torch copies into pinned memory
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def __call__(self) -> list[int]:
        self._arrived.synchronize()
        return self._counts_E.tolist()

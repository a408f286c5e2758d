"""Decisions that hold for all modules and kernels: dtypes, float32 products, compilation, recomputation.

- Activations have the dtype of the weights (`train.precision`). Where that is narrower than float32, statistics,
  softmaxes, losses, router arithmetic and the element-wise part of hand-written backward passes are float32:
  `wide_dtype`.
- float32 matrix products on CUDA are IEEE float32, never TF32; on a CPU the faster of two equally exact ways computes
  those of each dtype: `choose_products`.
- On CUDA the Triton kernels of `moe.kernels.fused` run where `runs_fused` says so, else the plain code beside them.
- `torch.compile` is used only where eager mode has no kernel (flex attention), and only through `compiled`.
- What `device` and `dtype` of a command name: `choose_device`, `torch_dtype`.
- The parts named by `model.recompute` run through `recomputed`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe.config import Precision
from moe.errors import UserError
from moe.kernels import bfloat16_products, float32_products

FUSED_DTYPES = (torch.bfloat16, torch.float32)
_plain = False  # NOTE: not a ContextVar: autograd runs backward passes on CUDA in threads of its own


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precisions; float32 and float64 as they are."""
    return torch.promote_types(dtype, torch.float32)


def widen(x: Tensor) -> Tensor:
    """x in its `wide_dtype`."""
    return x.to(wide_dtype(x.dtype))


def choose_products(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Makes float32 matrix products on CUDA IEEE float32; on a CPU takes the ways that `float32_products` and
    `bfloat16_products` measure to be best. Returns a line for the log about products of `dtype`.

    A float32 run must equal a CPU run to rounding. With bfloat16 weights the router still computes in float32: TF32's
    10-bit mantissa would send some tokens to other experts.
    """
    if device.type == "cpu":
        routes = float32_products.choose(), bfloat16_products.choose()
        return str(routes[dtype is torch.bfloat16])
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    return "float32 matrix products: IEEE float32, no TF32"


def runs_fused(x: Tensor) -> bool:
    """Whether x's device and dtype take the Triton kernels. Not for subclasses of Tensor, such as fake tensors."""
    if not x.is_cuda or _plain or x.dtype not in FUSED_DTYPES or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    return fused_obstacle(x.device, x.dtype) is None


@cache
def fused_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel runs on this device and dtype; None if they do.

    The first call on a GPU compiles every kernel (seconds; Triton keeps the results in its cache folder) and compares
    its results with the plain code's.
    """
    obstacle = _triton_obstacle(device)
    if obstacle is not None:
        return obstacle
    from moe.kernels.fused.check import find_fault  # imports triton

    return find_fault(device, dtype)


def _triton_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "they need CUDA"
    if importlib.util.find_spec("triton") is None:
        return "triton isn't installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "they need a GPU of compute capability 8.0 or newer"
    return None


@cache
def gemm_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """The same for the grouped products of `experts.backend=triton`, which don't depend on the other kernels."""
    obstacle = _triton_obstacle(device)
    if obstacle is None and dtype not in FUSED_DTYPES:
        obstacle = "they need bfloat16 or float32"
    if obstacle is not None:
        return obstacle
    from moe.kernels.fused.check import find_gemm_fault

    return find_gemm_fault(device, dtype)


@cache
def float8_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel that rounds to float8 doesn't run where `fused_obstacle` lets the others run; None if it does."""
    from moe.kernels.fused.check import find_float8_fault

    return find_float8_fault(device, dtype)


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Within it the plain code runs on every device, in all threads: for comparisons."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def torch_dtype(precision: Precision) -> torch.dtype:
    return torch.bfloat16 if precision is Precision.bfloat16 else torch.float32


def choose_device(stated: str) -> torch.device:
    """`auto` is the GPU where torch sees one, else the CPU. Raises UserError for a GPU that isn't there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if stated == "auto":
        return torch.device("cuda" if count else "cpu")
    device = torch.device(stated)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"device={stated}: torch sees {count} CUDA devices here: device=cpu, or `moe doctor` says why")
    return device


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile(function)`, once per process and at its first use, so that importing a module starts no compiler.

    The first call compiles for its shapes; the first call with another shape compiles once more, for all shapes.
    """
    return torch.compile(function)


def recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)` without storing its activations: the backward pass runs it again.

    Dropout and jitter repeat the same numbers, since `Randomness` computes them from the sample. With expert
    parallelism the exchanges run again too; every rank's backward pass reaches the blocks in the same order, so none
    hangs.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)

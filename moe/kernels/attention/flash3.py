"""`flash3`: `varlen` with the kernels of FlashAttention 3 (arXiv 2407.08608), which are written for Hopper GPUs.

torch has an adapter for them (`torch.nn.attention.activate_flash_attention_impl("FA3")`) and takes the kernels from the
package `flash_attn_interface`, built from the folder `hopper` of github.com/Dao-AILab/flash-attention. While they are
active, torch's scaled_dot_product_attention takes them too where it would take FlashAttention 2. Never run on a GPU.

Legend: B batch, S sequence, N query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

import importlib.util
from functools import cache, partial

import torch
from torch import Tensor

from moe.kernels.attention.naive import naive_attend
from moe.kernels.attention.pattern import Attend
from moe.kernels.attention.varlen import use_flash3, varlen_attend, varlen_obstacle
from moe.kernels.comparison import relative_error

PACKAGE = "flash_attn_interface"
HEADS, KV_HEADS = 4, 2
LENGTHS = [200, 100, 1, 299]  # of documents in rows of 300: kernels take blocks of 64 to 128 queries or keys
WINDOWS = (None, 9)
TOLERANCE = 2e-2  # of the largest result: half precisions, rounded several times on the way to a gradient


flash3_attend = partial(varlen_attend, flash3=True)


@cache
def flash3_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why it can't run; empty if it can. The first call for a GPU, dtype and head size with nothing else in the way
    compares results with the plain reference's."""
    obstacle = varlen_obstacle(device, dtype, head_dim)
    if obstacle:
        return obstacle
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"it needs a GPU of compute capability 9.x, this one has {major}.{minor}"
    if importlib.util.find_spec(PACKAGE) is None:
        return f"{PACKAGE} isn't installed"
    return find_flash3_fault(device, dtype, head_dim)


def find_flash3_fault(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What is wrong with its outputs or gradients, with grouped queries, documents, and with and without a window, or
    why it fails; empty if nothing."""
    try:
        for window in WINDOWS:
            error = _error(device, dtype, head_dim, window)
            if not error <= TOLERANCE:
                pattern = "without a window" if window is None else "with a window"
                return f"{pattern} it is wrong by {error:.1e} of its largest result"
    except Exception as error:  # of many types, from the package's import, its kernels and the driver
        return f"it failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    finally:
        use_flash3(False)
    return ""


@torch.inference_mode(False)
@torch.enable_grad()
def _error(device: torch.device, dtype: torch.dtype, head_dim: int, window: int | None) -> float:
    """Of the output and the gradients of q, k and v."""
    shape = batch, length = 2, sum(LENGTHS) // 2
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(batch, length, heads, head_dim, generator=generator).to(device, dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    ids = torch.arange(len(LENGTHS), dtype=torch.int32).repeat_interleave(torch.tensor(LENGTHS))
    ids_BS = ids.view(shape).to(device)
    found, wanted = (
        _results(attend, [tensor.detach().requires_grad_() for tensor in (q, k, v)], grad.flatten(2))
        for attend in (
            flash3_attend(shape, window, ids_BS, device, LENGTHS),
            naive_attend(length, window, ids_BS, device),
        )
    )
    return relative_error(found, wanted)


def _results(attend: Attend, inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    out = attend(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)

"""Runs kernels once on a GPU, beside the plain code."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moe.kernels.comparison import relative_error
from moe.kernels.fused.pairs import Pair, Sizes, float8_pairs, gemm_pairs, pairs
from moe.kernels.policy import plain_kernels

# Of the largest result. Both compute in float32 and round once; some plain code rounds once or twice more.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}


def find_fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """The first kernel that can't be compiled or run here, or is wrong, as text for the log; None if all are right.
    Those that have conditions of their own are left out: see `find_float8_fault` and `find_gemm_fault`."""
    return _fault(pairs(device, dtype, Sizes()), dtype)


def find_float8_fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """The same for the kernel that rounds to float8."""
    return _fault(float8_pairs(device, dtype, Sizes()), dtype)


def find_gemm_fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """The same for the grouped products of `experts.backend=triton`."""
    return _fault(gemm_pairs(device, dtype, Sizes()), dtype)


def _fault(tried: Iterator[Pair], dtype: torch.dtype) -> str | None:
    for name, _, fused, plain, _ in tried:
        try:
            found = fused()
            found[0].sum().item()  # waits, so that a fault on the device is raised here
        except Exception as error:  # of many types, from the compiler, its linker and the driver
            return f"{name} failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        with plain_kernels():
            wanted = plain()
        error = relative_error(found, wanted)
        if not error <= TOLERANCES[dtype]:
            return f"{name} is wrong by {error:.1e} of its largest result"
    return None

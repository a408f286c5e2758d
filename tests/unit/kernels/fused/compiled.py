"""Compiles every fused kernel for an H100 or H200 (sm_90) without a GPU, as its own functions would launch it, and
prints one JSON object a kernel: `python -m tests.unit.kernels.fused.compiled one_pass`, or with `products`.

Triton's driver is replaced by one that names the GPU, and each launch by a compilation, so block sizes, constants and
what Triton assumes of the arguments (alignment) are those of a real launch.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from moe.kernels.fused import cross_entropy, float8, gemm, launch, rotary, rows, swiglu
from moe.kernels.fused.pairs import MIXTRAL, Sizes, float8_pairs, gemm_pairs, pairs
from moe.kernels.policy import FUSED_DTYPES

SHAPES = (
    replace(MIXTRAL, tokens=4, experts=2),
    Sizes(tokens=4, choices=8, hidden=1024, width=512, vocab=1024, heads=20, head_dim=64, experts=2),
    # Rows that aren't aligned.
    Sizes(tokens=4, choices=1, hidden=1001, width=997, vocab=999, heads=3, head_dim=70, experts=2),
)
PARTS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {  # modules with kernels, and what lists them
    "one_pass": ((cross_entropy, float8, rotary, rows, swiglu), (pairs, float8_pairs)),
    "products": ((gemm,), (gemm_pairs,)),
}
TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Hopper:
    """What `JITFunction.run` asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_instead(
    aligned: bool,
    kernel: Any,
    grid: tuple[int, ...],
    blocks: launch.Blocks | launch.Tiles,
    *arguments: Any,
    **constants: Any,
):
    compiled = kernel.warmup(*arguments, grid=grid, num_warps=blocks.warps, **constants)
    row = {"kernel": kernel.fn.__name__, "dtype": str(arguments[0].dtype), "constants": constants, "aligned": aligned}
    row |= {"shared": compiled.metadata.shared}  # bytes of a program
    print(json.dumps(row | resources(compiled)), flush=True)


def resources(compiled: Any) -> dict[str, Any]:
    """Registers and bytes of stack (spilled registers) of a thread, and the widths of its memory instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "SHARED")}  # type: ignore[index]
    code = re.findall(r"\b(?:ld|st)\.global(?:\.[a-z]\w*)*?\.((?:v\d\.)?b\d+)", compiled.asm["ptx"])
    found["matrix_units"] = compiled.asm["ptx"].count("wgmma.mma_async")
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, (0x\w+|\d+)", compiled.asm["ptx"])
    found["copies"] = {width: copies.count(width) for width in sorted(set(copies))}  # bytes of each to shared memory
    found["inexact_divisions"] = compiled.asm["ptx"].count("div.full")
    return found | {"memory": {width: code.count(width) for width in sorted(set(code))}}


def main(part: str) -> None:
    driver.set_active(Hopper())  # type: ignore[arg-type]
    modules, lists = PARTS[part]
    for shape in SHAPES:
        for module in modules:
            module.launch = partial(compile_instead, shape.hidden % 16 == 0)  # type: ignore[assignment]
        for dtype in FUSED_DTYPES:
            for made in lists:
                for pair in made(torch.device("cpu"), dtype, shape):
                    pair.fused()


if __name__ == "__main__":
    main(sys.argv[1])

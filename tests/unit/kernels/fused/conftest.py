"""Triton's interpreter runs the kernels on this machine's CPU, program by program.

It rounds to bfloat16 towards zero where a GPU rounds to the nearest, hence tolerances of two roundings.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

MODULES = ("launch", "swiglu", "rows", "cross_entropy", "rotary", "float8", "gemm", "check")


@pytest.fixture(scope="module")
def fused() -> Iterator[SimpleNamespace]:
    """The modules of `moe.kernels.fused`, imported anew: `triton.jit` reads the variable when a kernel is defined."""
    pytest.importorskip("triton")
    package = "moe.kernels.fused"
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(package + ".")}
    stated = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    yield SimpleNamespace(**{name: importlib.import_module(f"{package}.{name}") for name in MODULES})
    del os.environ["TRITON_INTERPRET"]
    if stated is not None:
        os.environ["TRITON_INTERPRET"] = stated
    for name in [name for name in sys.modules if name.startswith(package + ".")]:
        del sys.modules[name]
    sys.modules.update(before)

"""What the kernels become on an H100 or H200: compiled for sm_90 here, without a GPU."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch


def test_rows_of(fused: SimpleNamespace) -> None:
    x = torch.arange(60).view(3, 4, 5)
    assert torch.equal(fused.launch.rows_of(x), x.view(12, 5))
    wide = x[..., 1:3]
    assert fused.launch.rows_of(wide).data_ptr() == wide.data_ptr()  # a view
    turned = x[0].t()
    assert torch.equal(fused.launch.rows_of(turned), turned)
    assert fused.launch.rows_of(turned).stride(1) == 1


def test_powers_of_two(fused: SimpleNamespace) -> None:
    assert [fused.launch.power_of_two(size) for size in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]


def compiled(part: str, folder: Path) -> list[dict[str, Any]]:
    """A row for each kernel of a part of `compiled.PARTS`, shape and dtype."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.kernels.fused.compiled", part],
        env=environment | {"TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def kernels_of(*modules: Any) -> set[str]:
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if hasattr(value, "fn") and "tl.program_id" in inspect.getsource(value.fn)
    }


@pytest.mark.slow
def test_every_kernel_of_one_pass_compiles_for_sm_90(fused: SimpleNamespace, tmp_path: Path) -> None:
    """Aligned rows are read and written 16 bytes at a time, at most one value is spilled, and a multiprocessor (65,536
    registers) holds at least 6 programs of 128 threads."""
    found = compiled("one_pass", tmp_path)
    modules = (fused.cross_entropy, fused.float8, fused.rotary, fused.rows, fused.swiglu)
    assert {each["kernel"] for each in found} == kernels_of(*modules)
    for each in found:
        assert each["STACK"] <= 8, each  # triton 3.9 puts one value of one kernel there, at 8 choices a token
        assert each["REG"] <= 80 or each["kernel"] == "_quantize", each
        assert not each["inexact_divisions"] or each["kernel"] != "_quantize", each
        if each["aligned"]:  # as all vectors of `experts.fp8` are
            assert each["REG"] <= 80, each
            assert each["memory"]["v4.b32"] >= 2, each
            assert each["memory"].get("b16", 0) <= 1, each  # the logit of the label


@pytest.mark.slow
def test_grouped_products_compile_for_sm_90(fused: SimpleNamespace, tmp_path: Path) -> None:
    """bfloat16 factors go to the matrix units. Aligned ones are copied to shared memory 16 bytes at a time, several
    tiles ahead, and at most four values are spilled."""
    found = compiled("products", tmp_path)
    assert {each["kernel"] for each in found} == kernels_of(fused.gemm)
    for each in found:
        many = each["constants"]["COLUMNS"] == 256
        assert each["shared"] <= (163 if many else 99) << 10, each  # an A100's, and that of GPUs with less
        assert bool(each["matrix_units"]) is (each["dtype"] == "torch.bfloat16"), each
        if each["aligned"]:
            assert each["STACK"] <= 16, each
            assert set(each["copies"]) == {"0x10"}, each
            assert each["memory"]["v4.b32"] >= 4, each
            assert not {"b16", "b32"} & each["memory"].keys(), each

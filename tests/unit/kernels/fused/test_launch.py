"""What the kernels become on an H100 or H200: compiled for sm_90 here, without a GPU."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


@pytest.mark.slow
def test_every_kernel_compiles_for_sm_90(fused: SimpleNamespace, tmp_path: Path) -> None:
    """Aligned rows are read and written 16 bytes at a time, at most one value is spilled, and a multiprocessor (65,536
    registers) holds at least 6 programs of 128 threads."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.kernels.fused.compiled"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    names = {
        name
        for module in (fused.cross_entropy, fused.float8, fused.rotary, fused.rows, fused.swiglu)
        for name, value in vars(module).items()
        if hasattr(value, "fn") and "tl.program_id" in inspect.getsource(value.fn)
    }
    assert {each["kernel"] for each in compiled} == names
    for each in compiled:
        assert each["STACK"] <= 8, each  # triton 3.9 puts one value of one kernel there, at 8 choices a token
        assert each["REG"] <= 80 or each["kernel"] == "_quantize", each
        assert not each["inexact_divisions"] or each["kernel"] != "_quantize", each
        if each["aligned"]:  # as all vectors of `experts.fp8` are
            assert each["REG"] <= 80, each
            assert each["memory"]["v4.b32"] >= 2, each
            assert each["memory"].get("b16", 0) <= 1, each  # the logit of the label

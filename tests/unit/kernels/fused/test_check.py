"""The comparison that decides whether Triton's kernels run on a GPU: interpreted here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kernel_is_right(fused: SimpleNamespace, dtype: torch.dtype) -> None:
    assert fused.check.find_fault(CPU, dtype) is None
    assert fused.check.find_float8_fault(CPU, dtype) is None


def test_without_float8_numbers_the_other_kernels_run(fused: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: object) -> None:
        raise ValueError("type fp8e4nv not supported in this architecture")

    monkeypatch.setattr(fused.float8, "quantize", fails)
    assert fused.check.find_fault(CPU, torch.bfloat16) is None
    assert fused.check.find_float8_fault(CPU, torch.bfloat16).startswith("float8 of rows failed: ValueError: type")


def test_a_wrong_kernel_is_named(fused: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused.swiglu.swiglu_backward
    monkeypatch.setattr(fused.swiglu, "swiglu_backward", lambda *inputs: (right(*inputs)[0], right(*inputs)[1] * 1.001))
    fault = fused.check.find_fault(CPU, torch.float32)
    assert fault == "dense SwiGLU backward is wrong by 1.0e-03 of its largest result"


def test_nan_is_wrong(fused: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused.swiglu.swiglu
    monkeypatch.setattr(fused.swiglu, "swiglu", lambda *inputs: right(*inputs) * float("nan"))
    assert fused.check.find_fault(CPU, torch.float32).startswith("SwiGLU is wrong by inf")


def test_a_kernel_that_fails_is_named(fused: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*inputs: object) -> None:
        raise OSError("no ptxas\nat all")

    monkeypatch.setattr(fused.swiglu, "swiglu", fails)
    assert fused.check.find_fault(CPU, torch.float32) == "SwiGLU failed: OSError: no ptxas"

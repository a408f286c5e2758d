"""The comparison that decides whether Triton's kernels run on a GPU: interpreted here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kernel_is_right(fused: SimpleNamespace, dtype: torch.dtype) -> None:
    assert fused.check.find_fault(CPU, dtype) is None


def test_a_wrong_kernel_is_named(fused: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused.rows.combine_backward
    monkeypatch.setattr(fused.rows, "combine_backward", lambda *inputs: (right(*inputs)[0] * 1.001, right(*inputs)[1]))
    assert fused.check.find_fault(CPU, torch.float32).startswith("combine backward is wrong by 1.0e-03 of its largest")


def test_nan_is_wrong(fused: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused.swiglu.swiglu
    monkeypatch.setattr(fused.swiglu, "swiglu", lambda *inputs: right(*inputs) * float("nan"))
    assert fused.check.find_fault(CPU, torch.float32).startswith("SwiGLU is wrong by inf")


def test_a_kernel_that_fails_is_named(fused: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*inputs: object) -> None:
        raise OSError("no ptxas\nat all")

    monkeypatch.setattr(fused.rows, "zero_idle", fails)
    assert fused.check.find_fault(CPU, torch.float32) == "zeros of idle experts failed: OSError: no ptxas"

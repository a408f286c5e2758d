"""Dtypes, float32 products, recomputation."""

import sys
import types

import pytest
import torch
from torch import nn

from moe.kernels import policy
from moe.kernels.policy import choose_products, compiled, plain_kernels, recomputed, runs_fused, wide_dtype, widen


def test_only_half_precisions_are_widened():
    wide = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float32}
    for dtype, expected in (wide | {torch.float64: torch.float64}).items():
        x = torch.ones(3, dtype=dtype)
        assert wide_dtype(dtype) == widen(x).dtype == expected
        assert (widen(x) is x) == (dtype == expected)


def test_float32_products_are_exact_on_cuda_alone():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert choose_products(torch.device("cpu")).startswith("float32 matrix products: ")
        assert matmul.fp32_precision == "tf32"
        assert "IEEE" in choose_products(torch.device("cuda"))
        assert matmul.fp32_precision == "ieee"
    finally:
        matmul.fp32_precision = before


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch):
    """A GPU on which every kernel is right; none is there, so nothing may run on it."""
    policy.fused_obstacle.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(policy.importlib.util, "find_spec", lambda name: name)
    check = types.ModuleType("moe.kernels.fused.check")
    check.find_fault = lambda device, dtype: None
    monkeypatch.setitem(sys.modules, check.__name__, check)
    yield check
    policy.fused_obstacle.cache_clear()


CUDA = torch.device("cuda", 0)


def test_why_no_triton_kernel_runs(hopper, monkeypatch):
    assert policy.fused_obstacle(torch.device("cpu"), torch.bfloat16) == "they need CUDA"
    assert policy.fused_obstacle(CUDA, torch.bfloat16) is None
    policy.fused_obstacle.cache_clear()
    hopper.find_fault = lambda device, dtype: "combine failed: OutOfResources: shared memory"
    assert policy.fused_obstacle(CUDA, torch.bfloat16) == "combine failed: OutOfResources: shared memory"
    policy.fused_obstacle.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert policy.fused_obstacle(CUDA, torch.bfloat16) == "they need a GPU of compute capability 8.0 or newer"
    policy.fused_obstacle.cache_clear()
    monkeypatch.setattr(policy.importlib.util, "find_spec", lambda name: None)
    assert policy.fused_obstacle(CUDA, torch.bfloat16) == "triton isn't installed"


def test_why_tritons_grouped_products_do_not_run(hopper, monkeypatch):
    """They don't depend on the other kernels, nor these on them."""
    policy.gemm_obstacle.cache_clear()
    hopper.find_gemm_fault = lambda device, dtype: "rows × weight failed: OutOfResources: shared memory"
    assert policy.fused_obstacle(CUDA, torch.bfloat16) is None
    assert policy.gemm_obstacle(CUDA, torch.bfloat16) == "rows × weight failed: OutOfResources: shared memory"
    assert policy.gemm_obstacle(CUDA, torch.float64) == "they need bfloat16 or float32"
    assert policy.gemm_obstacle(torch.device("cpu"), torch.float32) == "they need CUDA"
    monkeypatch.setattr(policy.importlib.util, "find_spec", lambda name: None)
    assert policy.gemm_obstacle(CUDA, torch.float32) == "triton isn't installed"
    policy.gemm_obstacle.cache_clear()


class OnCuda:
    """What `runs_fused` reads of a tensor."""

    is_cuda, dtype, device = True, torch.bfloat16, CUDA


@pytest.mark.usefixtures("hopper")
def test_which_tensors_take_the_triton_kernels(monkeypatch):
    monkeypatch.setattr(policy, "Tensor", OnCuda)
    x = OnCuda()
    assert runs_fused(x)
    with plain_kernels():
        assert not runs_fused(x)
        with plain_kernels():
            pass
        assert not runs_fused(x)
    assert runs_fused(x)
    x.dtype = torch.float64
    assert not runs_fused(x)
    assert not runs_fused(type("Subclass", (OnCuda,), {})())
    assert not runs_fused(torch.ones(2))


def test_a_function_is_compiled_once():
    def twice(x):
        return x * 2

    assert compiled(twice) is compiled(twice)


def test_recomputed_runs_again_in_the_backward_pass():
    calls, layer = [], nn.Linear(3, 3)

    def function(x):
        calls.append(1)
        return layer(x).tanh()

    recomputed(function, torch.ones(2, 3)).sum().backward()
    assert len(calls) == 2
    with torch.no_grad():
        recomputed(function, torch.ones(2, 3))
    assert len(calls) == 3

"""Dtypes, float32 products, recomputation."""

import torch
from torch import nn

from moe.kernels.policy import compiled, exact_float32, recomputed, wide_dtype, widen


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
        assert exact_float32(torch.device("cpu")).startswith("float32 matrix products: ")
        assert matmul.fp32_precision == "tf32"
        assert "IEEE" in exact_float32(torch.device("cuda"))
        assert matmul.fp32_precision == "ieee"
    finally:
        matmul.fp32_precision = before


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

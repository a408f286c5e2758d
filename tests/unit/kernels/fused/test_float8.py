"""Rounding to float8, interpreted, against torch's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from moe.kernels.float8_products import quantize

SHAPES = [(1, 3, 16), (2, 5, 4100), (3, 130, 70), (1, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("columns", [False, True])
def test_equals_torch(fused: SimpleNamespace, dtype: torch.dtype, shape: tuple[int, int, int], columns: bool) -> None:
    x = (torch.randn(shape) * torch.logspace(-20, 20, shape[1]).unsqueeze(1)).to(dtype)
    if columns:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    values, inverse = fused.float8.quantize(x)
    wanted, wanted_inverse = quantize(x)
    assert (values.dtype, values.is_contiguous()) == (torch.float8_e4m3fn, True)
    assert torch.equal(inverse, wanted_inverse)
    assert torch.equal(values.view(torch.uint8), wanted.view(torch.uint8))


def test_every_bfloat16_number_is_rounded_as_torch_does(fused: SimpleNamespace) -> None:
    """Those up to 448, in vectors that begin with 448, so that the scale is 1."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[numbers.abs() <= 448]
    rows = F.pad(numbers, (0, -len(numbers) % 512)).view(-1, 512)
    x = torch.cat([torch.full_like(rows[:, :1], 448), rows], dim=1).unsqueeze(0)
    values, inverse = fused.float8.quantize(x)
    assert (inverse == 1).all()
    assert torch.equal(values[0, :, 1:].float(), rows.to(torch.float8_e4m3fn).float())


def test_scales_of_vectors_whose_largest_value_is_at_a_limit(fused: SimpleNamespace) -> None:
    """1.75 · 2^k is scaled to 448, the next larger number to 224 and a little more."""
    limits = 1.75 * 2.0 ** torch.arange(-90, 120).float()
    largest = torch.cat([limits, limits.nextafter(torch.tensor(torch.inf)), limits.nextafter(torch.tensor(0.0))])
    x = torch.stack([largest, -largest / 3], dim=1).unsqueeze(0)
    values, inverse = fused.float8.quantize(x)
    wanted, wanted_inverse = quantize(x)
    assert torch.equal(inverse, wanted_inverse)
    assert torch.equal(values.view(torch.uint8), wanted.view(torch.uint8))
    assert (values[0, : len(limits), 0].float() == 448).all()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_leaves_nothing_finite(fused: SimpleNamespace, bad: float) -> None:
    x = torch.randn(1, 2, 40)
    x[0, 1, 7] = bad
    values, inverse = fused.float8.quantize(x)
    back = values.float() * inverse.unsqueeze(2)
    assert back[0, 0].isfinite().all()
    assert not back[0, 1].isfinite().any()

"""Triton's grouped products, interpreted, against one product per expert in float64."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.kernels.grouped_products import per_expert_products
from moe.kernels.grouped_swiglu import GroupedSwiGLU, loop_ffn

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7}  # of the largest result
in_dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
in_sizes = pytest.mark.parametrize("size", ["many", "few"])
# Rows of each expert, and sizes before and after a product: parts of tiles, and whole ones.
CASES = [([5, 0, 70, 1], (70, 150)), ([0, 7, 0, 0, 0], (33, 17)), ([0, 128], (64, 256)), ([3], (1, 130))]


def randoms(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=TOLERANCES[found.dtype] * largest)


@in_dtypes
@in_sizes
@pytest.mark.parametrize(("counts", "shape"), CASES, ids=str)
def test_equals_one_product_per_expert(
    fused: SimpleNamespace, dtype: torch.dtype, size: str, counts: list[int], shape: tuple[int, int]
) -> None:
    (inner, columns), count, experts = shape, sum(counts), len(counts)
    rows, grad, weight = randoms((count, inner), (count, columns), (experts, inner, columns), dtype=dtype)
    mine, plain = fused.gemm.triton_products(torch.tensor(counts), size), per_expert_products(counts)
    close(mine.times_weight(rows, weight), plain.times_weight(rows.double(), weight.double()))
    close(mine.times_weight_t(grad, weight), plain.times_weight_t(grad.double(), weight.double()))
    outer = mine.outer(grad, rows)
    close(outer, plain.outer(grad.double(), rows.double()))
    assert all(outer[expert].count_nonzero() == 0 for expert, rows in enumerate(counts) if rows == 0)


@in_sizes
def test_no_row_reaches_another_experts_result(fused: SimpleNamespace, size: str) -> None:
    """Neighbours' rows and weights are NaN: a product that read past its own would be NaN too."""
    counts, bounds = [9, 33, 20], [0, 9, 42, 62]
    rows, grad, weight = randoms((62, 70), (62, 65), (3, 70, 65), dtype=torch.float32)
    wanted = per_expert_products(counts)
    for expert, (start, end) in enumerate(pairwise(bounds)):
        apart = [torch.full_like(one, float("nan")) for one in (rows, grad, weight)]
        apart[0][start:end], apart[1][start:end], apart[2][expert] = rows[start:end], grad[start:end], weight[expert]
        mine = fused.gemm.triton_products(torch.tensor(counts), size)
        close(mine.times_weight(apart[0], apart[2])[start:end], wanted.times_weight(rows, weight)[start:end].double())
        close(mine.outer(apart[1], apart[0])[expert], wanted.outer(grad, rows)[expert].double())


def test_the_memory_around_the_results_is_left_alone(fused: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []

    new_empty = Tensor.new_empty

    def inside_a_frame(x: Tensor, *shape: int, **options: Any) -> Tensor:
        if options:  # the interpreter's own copies
            return new_empty(x, *shape, **options)
        size = torch.Size(shape).numel()
        kept.append(torch.full((size + 64,), 7.0, dtype=x.dtype))
        return kept[-1][32 : 32 + size].view(shape)

    monkeypatch.setattr(Tensor, "new_empty", inside_a_frame)
    rows, weight = randoms((12, 20), (3, 20, 37), dtype=torch.float32)
    products = fused.gemm.triton_products(torch.tensor([5, 0, 7]))
    products.outer(products.times_weight(rows, weight), rows)
    assert len(kept) == 2
    assert all((frame[:32] == 7).all() and (frame[-32:] == 7).all() for frame in kept)


def test_strided_rows_and_no_rows(fused: SimpleNamespace) -> None:
    both, weight = randoms((11, 2 * 24), (2, 24, 40), dtype=torch.float32)
    rows = both.chunk(2, dim=1)[1]  # rows further apart than they are long
    mine, plain = fused.gemm.triton_products(torch.tensor([4, 7])), per_expert_products([4, 7])
    close(mine.times_weight(rows, weight), plain.times_weight(rows, weight).double())
    turned = weight.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(mine.times_weight(rows, turned), mine.times_weight(rows, weight))
    far = both[:, ::2]  # elements aren't adjacent
    close(mine.outer(far, rows), plain.outer(far, rows).double())
    none = fused.gemm.triton_products(torch.tensor([0, 0]))
    assert none.times_weight(rows[:0], weight).shape == (0, 40)
    assert torch.equal(none.outer(rows[:0], rows[:0]), torch.zeros(2, 24, 24))


@in_dtypes
def test_the_layer_over_them(fused: SimpleNamespace, dtype: torch.dtype) -> None:
    """The function that a GPU runs, without `zero_idle`: the products themselves write an idle expert's zeros."""
    counts = [6, 0, 20]
    tensors = randoms((26, 40), (3, 2 * 48, 40), (3, 40, 48), dtype=dtype)
    leaves = [one.requires_grad_() for one in tensors]
    (grad,) = randoms((26, 40), dtype=dtype)

    def unasked() -> list[int]:
        raise AssertionError("the host would wait for the counts")

    y = GroupedSwiGLU.apply(*leaves, unasked, fused.gemm.triton_products(torch.tensor(counts)))
    wide = [one.detach().double().requires_grad_() for one in leaves]
    wanted = loop_ffn(wide[0], counts, *wide[1:])
    found = [y.detach(), *torch.autograd.grad(y, leaves, grad)]
    for mine, exact in zip(found, [wanted.detach(), *torch.autograd.grad(wanted, wide, grad.double())], strict=True):
        error = (mine.double() - exact).norm() / exact.norm()
        assert error <= (1e-5 if dtype is torch.float32 else 3e-2), error


def test_the_class_of_tiles(fused: SimpleNamespace) -> None:
    rows = torch.empty(8 * 256, 1)
    table = fused.launch.TILES
    assert fused.gemm.tiles_for("rows", rows, 8) == table["rows", "many", torch.float32]
    assert fused.gemm.tiles_for("rows", rows, 9) == table["rows", "few", torch.float32]

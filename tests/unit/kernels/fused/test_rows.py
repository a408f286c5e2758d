"""Sums of rows and their backward pass, interpreted, against plain indexing in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moe.kernels.permute import RowOrder, combine_rows_reference, gather_rows_reference, sum_rows
from moe.sparse.dispatch import sort_by_expert
from moe.sparse.routers.base import Choices, count_choices

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-7}
EXPERTS = 70
in_dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def routed(tokens: int, choices: int | None) -> tuple[RowOrder, Tensor]:
    """The order of rows and the weights: `choices` of each token, or with None from none to many."""
    generator = torch.Generator().manual_seed(tokens)
    if choices is not None:
        ids_TK = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :choices]
        routed = Choices.top_k(ids_TK, torch.rand(tokens, choices, generator=generator))
    else:
        share = torch.rand(tokens, 1, generator=generator) * 0.2 - 0.05
        tokens_N, experts_N = (torch.rand(tokens, EXPERTS, generator=generator) < share).nonzero().unbind(1)
        routed = Choices(tokens_N, experts_N, torch.rand(len(tokens_N), generator=generator), tokens)
    return sort_by_expert(routed, count_choices(routed.experts_N, EXPERTS))


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    atol = TOLERANCES[dtype] * float(wanted.detach().abs().max() if wanted.numel() else 0)
    torch.testing.assert_close(found.double(), wanted.double(), rtol=TOLERANCES[dtype], atol=atol)


CASES = {
    "top 1": (7, 1, 8), "top 2": (5, 2, 2050), "top 3": (6, 3, 33), "top 8": (3, 8, 257),
    "all experts": (2, EXPERTS, 65), "ragged": (40, None, 100), "no tokens": (0, 2, 8), "one column": (4, 2, 1),
}  # fmt: skip


@in_dtypes
@pytest.mark.parametrize(("tokens", "choices", "hidden"), CASES.values(), ids=CASES.keys())
def test_equal_the_reference(
    fused: SimpleNamespace, dtype: torch.dtype, tokens: int, choices: int | None, hidden: int
) -> None:
    order, weights_TK = routed(tokens, choices)
    if choices is None:
        assert order.filled_TK is not None
        assert not order.filled_TK.any(1).all()  # a token without a choice
    generator = torch.Generator().manual_seed(0)
    count = order.tokens_N.numel()
    y_NH, dy_TH, x_TH = (torch.randn(size, hidden, generator=generator).to(dtype) for size in (count, tokens, tokens))
    leaves = [y_NH.double().requires_grad_(), weights_TK.double().requires_grad_(), x_TH.double().requires_grad_()]
    wanted_TH = combine_rows_reference(leaves[0], leaves[1], order)
    wanted = torch.autograd.grad(wanted_TH, leaves[:2], dy_TH.double())
    (wanted_dx,) = torch.autograd.grad(gather_rows_reference(leaves[2], order), leaves[2], y_NH.double())

    close(fused.rows.sum_rows(y_NH, order.rows_TK, weights_TK, order.filled_TK), wanted_TH, dtype)
    close(fused.rows.sum_rows(y_NH, order.rows_TK, None, order.filled_TK), wanted_dx, dtype)
    close(sum_rows(y_NH, order, None), wanted_dx, dtype)
    drows, dweights = fused.rows.combine_backward(dy_TH, y_NH, weights_TK, order.rows_TK, order.filled_TK)
    assert (drows.dtype, dweights.dtype) == (dtype, torch.float32)
    close(drows, wanted[0], dtype)
    close(dweights, wanted[1], torch.float32)  # a token's places without a choice get 0 in both


@in_dtypes
def test_strided_inputs(fused: SimpleNamespace, dtype: torch.dtype) -> None:
    order, weights_TK = routed(6, 2)
    y_NH, dy_TH = torch.randn(12, 40).to(dtype), torch.randn(6, 40).to(dtype)
    wide_NH = torch.full((12, 100), float("nan"), dtype=dtype)[:, 3:43].copy_(y_NH)  # rows of a wider matrix
    turned_TH = dy_TH.t().contiguous().t()
    weights_KT = weights_TK.t().contiguous()
    found = fused.rows.combine_backward(turned_TH, wide_NH, weights_KT.t(), order.rows_TK, None)
    wanted = fused.rows.combine_backward(dy_TH, y_NH, weights_TK, order.rows_TK, None)
    assert all(torch.equal(mine, other) for mine, other in zip(found, wanted, strict=True))
    found_TH = fused.rows.sum_rows(wide_NH, order.rows_TK, weights_KT.t(), None)
    assert torch.equal(found_TH, fused.rows.sum_rows(y_NH, order.rows_TK, weights_TK, None))


def test_a_row_of_no_choice_is_not_read(fused: SimpleNamespace) -> None:
    """Places without a choice name some valid row: its NaN must not reach other tokens."""
    order, weights_TK = routed(40, None)
    y_NH = torch.randn(order.tokens_N.numel(), 20)
    y_NH[0] = float("nan")
    out_TH = fused.rows.sum_rows(y_NH, order.rows_TK, weights_TK, order.filled_TK)
    wrong = out_TH.isnan().any(1)
    assert wrong.sum() == 1
    assert wrong[order.tokens_N[0]]


@in_dtypes
def test_only_idle_experts_get_zeros(fused: SimpleNamespace, dtype: torch.dtype) -> None:
    counts_E = torch.tensor([3, 0, 1, 0])
    grads = [torch.randn(4, 3, 7).to(dtype), torch.randn(4, 50, 100).to(dtype)]
    wanted = [grad.clone() for grad in grads]
    for grad in wanted:
        grad[counts_E == 0] = 0
        assert (grad[counts_E != 0] != 0).any()
    for grad in grads:
        grad[1].fill_(float("nan"))  # memory that a product left unwritten
    fused.rows.zero_idle(counts_E, *grads)
    assert all(torch.equal(mine, other) for mine, other in zip(grads, wanted, strict=True))

"""Rows into expert order and back: the kernels against plain indexing, with any number of choices per token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.kernels.permute import combine_rows, combine_rows_reference, gather_rows, gather_rows_reference
from moe.sparse.dispatch import sort_by_expert
from moe.sparse.routers.base import Choices, count_choices

TOKENS, EXPERTS, HIDDEN = 11, 5, 8


def _regular(top_k: int) -> Choices:
    ids_TK = torch.rand(TOKENS, EXPERTS).argsort(1)[:, :top_k]
    return Choices.top_k(ids_TK, torch.rand(TOKENS, top_k, dtype=torch.float64))


def _ragged(density: float) -> Choices:
    """Choices of tokens that have 0 … E each, as with a router in which experts choose tokens."""
    tokens_N, experts_N = (torch.rand(TOKENS, EXPERTS) < density).nonzero().unbind(1)
    return Choices(tokens_N, experts_N, torch.rand(len(tokens_N), dtype=torch.float64), TOKENS)


CASES = {
    "top 1": lambda: _regular(1),
    "top 3": lambda: _regular(3),
    "all experts": lambda: _regular(EXPERTS),
    "ragged": lambda: _ragged(0.4),
    "few": lambda: _ragged(0.1),
    "none at all": lambda: _ragged(0.0),
    "all kept": lambda: _ragged(2.0),
}


def _oracle(x_TH: Tensor, choices: Choices, counts_E: Tensor) -> Tensor:
    """Σ weight · (expert + 1) · x over a token's choices, one after another."""
    out_TH = 0 * x_TH
    for token, expert, weight in zip(choices.tokens_N, choices.experts_N, choices.weights_N, strict=True):
        row = weight * (expert + 1) * x_TH[token]
        out_TH = out_TH + torch.zeros_like(x_TH).index_add(0, token[None], row[None])
    return out_TH


@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_kernels_and_references_equal_a_loop_over_choices(make) -> None:
    choices = make()
    choices.weights_N.requires_grad_()
    x_TH = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    counts_E, upstream_TH = count_choices(choices.experts_N, EXPERTS), torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    expected = _oracle(x_TH, choices, counts_E)
    grads = torch.autograd.grad(expected, (x_TH, choices.weights_N), upstream_TH, allow_unused=True)
    order, weights_TK = sort_by_expert(choices, counts_E)
    experts_N = torch.arange(EXPERTS).repeat_interleave(order.counts_E)
    assert torch.equal(order.counts_E, counts_E)
    for gather, combine in ((gather_rows, combine_rows), (gather_rows_reference, combine_rows_reference)):
        y_NH = gather(x_TH, order) * (experts_N + 1)[:, None]
        out_TH = combine(y_NH, weights_TK, order)
        torch.testing.assert_close(out_TH, expected)
        found = torch.autograd.grad(
            out_TH, (x_TH, choices.weights_N), upstream_TH, retain_graph=True, allow_unused=True
        )
        for ours, theirs in zip(found, grads, strict=True):
            zeros = torch.zeros(()) if ours is None else torch.zeros_like(ours)
            torch.testing.assert_close(zeros if ours is None else ours, zeros if theirs is None else theirs)


@pytest.mark.parametrize("make", [CASES["top 3"], CASES["ragged"]], ids=["top 3", "ragged"])
def test_rows_of_an_expert_keep_token_order(make) -> None:
    choices = make()
    order, _ = sort_by_expert(choices, count_choices(choices.experts_N, EXPERTS))
    for rows in order.tokens_N.split(order.counts_E.tolist()):
        assert (rows.diff() > 0).all()


def test_bfloat16_rows_are_summed_in_float32() -> None:
    choices = _ragged(0.6)
    choices.weights_N = choices.weights_N.float()
    order, weights_TK = sort_by_expert(choices, count_choices(choices.experts_N, EXPERTS))
    y_NH = torch.randn(len(choices.tokens_N), HIDDEN).bfloat16()
    exact_TH = combine_rows_reference(y_NH.double(), weights_TK.double(), order)
    torch.testing.assert_close(combine_rows(y_NH, weights_TK, order), exact_TH.bfloat16(), rtol=0, atol=0)

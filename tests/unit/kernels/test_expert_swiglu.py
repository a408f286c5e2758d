"""The experts' autograd functions with tokens and a combination: values, gradients, and what they keep and compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe.kernels import padded_rows
from moe.kernels.expert_swiglu import GroupedSwiGLU, PerExpertSwiGLU
from moe.kernels.grouped_products import torch_products
from moe.kernels.grouped_swiglu import loop_ffn
from moe.kernels.permute import RowOrder, combine_rows_reference, gather_rows_reference
from moe.sparse.dispatch import sort_by_expert
from moe.sparse.routers.base import Choices, count_choices

T, H, F, E = 9, 16, 24, 4
Run = Callable[..., Tensor]  # of x, gate_up_proj, down_proj, weights_TK


def _per_expert(order: RowOrder) -> Run:
    counts = order.counts_E.tolist()
    return lambda x, gate_up, down, weights: PerExpertSwiGLU.apply(x, gate_up, down, counts, weights, order)


def _grouped(order: RowOrder) -> Run:
    counts, products = order.counts_E.tolist(), torch_products(order.counts_E)
    return lambda x, gate_up, down, weights: GroupedSwiGLU.apply(
        x, gate_up, down, lambda: counts, products, weights, order
    )


def _reference(order: RowOrder) -> Run:
    counts = order.counts_E.tolist()

    def run(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        y_NH = loop_ffn(gather_rows_reference(x, order), counts, gate_up, down)
        return combine_rows_reference(y_NH, weights, order)

    return run


FUNCTIONS = {"per expert": _per_expert, "grouped": _grouped}


def _case(dtype: torch.dtype, *, ragged: bool = False) -> tuple[list[Tensor], Tensor, RowOrder]:
    """x, gate_up_proj, down_proj and weights_TK (float32 for bfloat16), dy and the order; expert 2 has no rows."""
    generator = torch.Generator().manual_seed(0)
    chosen_TE = torch.rand(T, E, generator=generator).argsort(1)
    ids_TK = torch.where(chosen_TE >= 2, chosen_TE + 1, chosen_TE)[:, :2].clamp(max=E - 1)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    weights_TK = torch.rand(T, 2, generator=generator, dtype=torch.float64).to(wide)
    choices = Choices.top_k(ids_TK, weights_TK)
    if ragged:  # token 1 has no choice, others have one or two
        choices = _kept(choices, (torch.rand(2 * T, generator=generator) < 0.6) & (choices.tokens_N != 1))
    order, weights_TK = sort_by_expert(choices, count_choices(choices.experts_N, E))
    assert order.counts_E[2] == 0
    shapes = (T, H), (E, 2 * F, H), (E, H, F), (T, H)
    *tensors, dy = (0.5 * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [*(one.to(dtype) for one in tensors), weights_TK.detach()], dy.to(dtype), order


def _kept(choices: Choices, kept_N: Tensor) -> Choices:
    fields = choices.tokens_N, choices.experts_N, choices.weights_N
    return Choices(*(one[kept_N] for one in fields), choices.num_tokens)


def _run(function: Run, tensors: list[Tensor], dy: Tensor, frozen: tuple[int, ...] = ()) -> list[Tensor]:
    leaves = [one.detach().clone().requires_grad_(place not in frozen) for place, one in enumerate(tensors)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [one for one in leaves if one.requires_grad], dy)]


@pytest.mark.parametrize("ragged", [False, True], ids=["dropless", "ragged"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 5e-7), (torch.bfloat16, 2e-2)]
)
def test_equals_gather_loop_and_combine_in_float64(
    function: str,
    dtype: torch.dtype,
    tolerance: float,
    ragged: bool,
    padded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if function == "grouped" and (padded or dtype is torch.float64):
        pytest.skip("no rows are padded, and grouped_mm takes no float64")
    monkeypatch.setattr(padded_rows, "pads", lambda device, dtype: padded)
    tensors, dy, order = _case(dtype, ragged=ragged)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        found = _run(FUNCTIONS[function](order), tensors, dy)
    finally:
        torch.use_deterministic_algorithms(False)
    exact = _run(_reference(order), [one.double() for one in tensors], dy.double())
    if order.filled_TK is not None:  # the gradient of a weight without a choice has no meaning
        found[4], exact[4] = found[4] * order.filled_TK, exact[4] * order.filled_TK
    for name, mine, wanted in zip(("y", "dx", "dgate_up", "ddown", "dweights"), found, exact, strict=True):
        assert mine.shape == wanted.shape, name
        assert mine.dtype == (tensors[3].dtype if name == "dweights" else dtype), name
        assert (mine.double() - wanted).norm() <= tolerance * wanted.norm(), name


@pytest.mark.parametrize("function", FUNCTIONS)
def test_neither_rows_nor_their_results_are_kept(function: str) -> None:
    tensors, _, order = _case(torch.float32)
    leaves = [one.requires_grad_() for one in tensors]
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.setdefault(one.data_ptr(), one), lambda one: one):
        FUNCTIONS[function](order)(*leaves)
    given = {one.data_ptr() for one in leaves}
    assert [tuple(one.shape) for place, one in kept.items() if place not in given] == [(2 * T, 2 * F)]  # gate/up


@pytest.mark.parametrize("counts", [[2, 3], [0, 4, 1], [0, 0]])
def test_gradcheck_of_rows(counts: list[int]) -> None:
    shapes = (sum(counts), 4), (len(counts), 6, 4), (len(counts), 4, 3)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *t: PerExpertSwiGLU.apply(*t, counts), tensors)


def test_gradcheck_of_tokens() -> None:
    tensors, _, order = _case(torch.float64)
    tensors = [tensors[0][:, :4], tensors[1][:, :6, :4], tensors[2][:, :4, :3], tensors[3]]
    leaves = [one.contiguous().requires_grad_() for one in tensors]
    assert torch.autograd.gradcheck(_per_expert(order), leaves)


def test_no_choice_at_all_gives_zeros() -> None:
    tensors, dy, _ = _case(torch.float32)
    choices = Choices.top_k(torch.zeros(T, 2, dtype=torch.int64), tensors[3])
    choices = _kept(choices, torch.zeros(2 * T, dtype=torch.bool))
    order, tensors[3] = sort_by_expert(choices, torch.zeros(E, dtype=torch.int64))
    for found in _run(_per_expert(order), tensors, dy):
        assert found.count_nonzero() == 0


class Counted(TorchDispatchMode):
    """Counts matrix products and copies of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.copies = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += "mm" in str(func)
        self.copies += "index_select" in str(func) and args[0].dim() == 2
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", [(1,), (2,), (1, 2), (0, 1), (0, 2), (3,)], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_frozen_costs_nothing_and_changes_no_other_bit(function: str, frozen: tuple[int, ...]) -> None:
    tensors, dy, order = _case(torch.float32)
    run, each = FUNCTIONS[function](order), 3 if function == "per expert" else 1  # experts that have rows

    def backward(frozen: tuple[int, ...]) -> tuple[list[Tensor], Counted]:
        leaves = [one.detach().clone().requires_grad_(place not in frozen) for place, one in enumerate(tensors)]
        y = run(*leaves)
        with Counted() as counted:
            return list(torch.autograd.grad(y, [one for one in leaves if one.requires_grad], dy)), counted

    expected, whole = backward(())
    found, counted = backward(frozen)
    assert (whole.products, whole.copies) == (4 * each, 2 * each)  # copies of x and of dy
    weights = len([one for one in frozen if one < 3])
    assert (counted.products, counted.copies) == ((4 - weights) * each, (1 + int(1 not in frozen)) * each)
    trained = [one for place, one in enumerate(expected) if place not in frozen]
    for mine, theirs in zip(found, trained, strict=True):
        assert torch.equal(mine, theirs)


def test_idle_experts_get_zero_gradients_even_if_the_kernel_writes_none() -> None:
    tensors, dy, order = _case(torch.float32)
    counts, products = order.counts_E.tolist(), torch_products(order.counts_E)

    def outer_with_garbage(left: Tensor, right: Tensor) -> Tensor:
        result = products.outer(left, right)
        result[2] = float("nan")
        return result

    garbage = products._replace(outer=outer_with_garbage)
    x, gate_up, down, weights = (one.requires_grad_() for one in tensors)
    GroupedSwiGLU.apply(x, gate_up, down, lambda: counts, garbage, weights, order).backward(dy)
    for weight in (gate_up, down):
        assert weight.grad is not None
        assert weight.grad[2].count_nonzero() == 0
        assert weight.grad.isfinite().all()

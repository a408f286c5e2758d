"""Grouped SwiGLU: every back-end against the loop in float64, outputs and gradients; the choice of back-end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe.config import ExpertBackend, ExpertsConfig
from moe.kernels.grouped_products import torch_products
from moe.kernels.grouped_swiglu import GroupedSwiGLU, PerExpertSwiGLU, grouped_ffn, loop_ffn, resolve_backend
from moe.kernels.permute import RowSource

CPU = torch.device("cpu")
COUNTS = {
    "uneven": [5, 1, 9, 3],
    "an expert idle": [4, 0, 11, 2],
    "all on one": [0, 0, 17, 0],
    "first and last idle": [0, 8, 8, 0],
    "one expert": [6],
    "three experts": [2, 7, 1],
    "all idle": [0, 0, 0],
}


def _inputs(counts: list[int], dtype: torch.dtype = torch.float64, hidden: int = 16, inner: int = 24) -> list[Tensor]:
    """x, gate_up_proj, down_proj and the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (sum(counts), hidden),
        (len(counts), 2 * inner, hidden),
        (len(counts), hidden, inner),
        (sum(counts), hidden),
    )
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 0.5 for shape in shapes]
    return [tensor.requires_grad_(index < 3) for index, tensor in enumerate(tensors)]


def _by_hand(x: Tensor, counts: list[int], gate_up: Tensor, down: Tensor) -> Tensor:
    """The definition, row by row, without code of the project."""
    experts = [expert for expert, count in enumerate(counts) for _ in range(count)]
    rows = []
    for row, expert in zip(x, experts, strict=True):
        gate, up = (gate_up[expert] @ row).tensor_split(2)
        rows.append(down[expert] @ (gate / (1 + torch.exp(-gate)) * up))
    return torch.stack(rows) if rows else x * 0


def _run(function: object, tensors: list[Tensor]) -> list[Tensor]:
    """Output and the gradients of x, gate_up_proj and down_proj."""
    x, gate_up, down, grad = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    y = function(x, gate_up, down)  # type: ignore[operator]
    y.backward(grad)
    return [y.detach(), x.grad, gate_up.grad, down.grad]


def _oracle(tensors: list[Tensor], counts: list[int]) -> list[Tensor]:
    """The loop's results in float64 for the same values."""
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    return _run(lambda x, gate_up, down: loop_ffn(x, counts, gate_up, down), doubles)


def _relative(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_the_loop_is_the_definition(counts: list[int]) -> None:
    tensors = _inputs(counts)
    ours = _run(lambda x, g, d: loop_ffn(x, counts, g, d), tensors)
    for tensor in tensors:
        tensor.grad = None
    y = _by_hand(tensors[0], counts, tensors[1], tensors[2])
    if sum(counts):
        y.backward(tensors[3])
        expected = [y.detach(), *[t.grad for t in tensors[:3]]]
    else:
        expected = [y.detach(), *[torch.zeros_like(t) for t in tensors[:3]]]
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("backend", [ExpertBackend.loop, ExpertBackend.grouped_mm])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 5e-7), (torch.bfloat16, 2e-2)]
)
def test_back_ends_equal_the_float64_oracle(
    backend: ExpertBackend, counts: list[int], dtype: torch.dtype, tolerance: float
) -> None:
    tensors = _inputs(counts, dtype)
    exact = _oracle(tensors, counts)
    ours = _run(lambda x, g, d: grouped_ffn(x, torch.tensor(counts), g, d, backend), tensors)
    for name, mine, reference in zip(("y", "dx", "dgate_up", "ddown"), ours, exact, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == reference.shape
        assert _relative(mine, reference) <= tolerance, name


@pytest.mark.parametrize("counts", [c for c in COUNTS.values() if sum(c)], ids=[k for k, c in COUNTS.items() if sum(c)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-7), (torch.bfloat16, 2e-2)])
def test_the_gpu_function_over_torchs_grouped_mm(counts: list[int], dtype: torch.dtype, tolerance: float) -> None:
    """The function that a GPU runs, with the CPU's grouped_mm, which has the same interface and requirements."""
    tensors = _inputs(counts, dtype)
    exact = _oracle(tensors, counts)
    ours = _run(
        lambda x, g, d: GroupedSwiGLU.apply(x, g, d, lambda: counts, torch_products(torch.tensor(counts))), tensors
    )
    for name, mine, reference in zip(("y", "dx", "dgate_up", "ddown"), ours, exact, strict=True):
        assert _relative(mine, reference) <= tolerance, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", ["per expert", "grouped"])
def test_rows_gathered_again_change_no_bit_and_are_not_kept(function: str, dtype: torch.dtype) -> None:
    counts = [3, 0, 5]
    _, gate_up, down, grad = _inputs(counts, dtype)
    x_TH = torch.randn(4, gate_up.shape[2], dtype=dtype, requires_grad=True)
    tokens_N = torch.tensor([0, 2, 3, 0, 1, 2, 3, 1])

    def run(again: bool) -> list[Tensor]:
        x_NH = x_TH.index_select(0, tokens_N)
        source = RowSource(x_TH, tokens_N) if again else None
        kept = set[int]()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t):
            if function == "grouped":
                products = torch_products(torch.tensor(counts))
                y = GroupedSwiGLU.apply(x_NH, gate_up, down, lambda: counts, products, source)
            else:
                y = grouped_ffn(x_NH, torch.tensor(counts), gate_up, down, ExpertBackend.grouped_mm, source)
        assert (x_TH.data_ptr() in kept) is again
        if dtype is torch.float32:  # rows of bfloat16 are padded
            assert (x_NH.data_ptr() in kept) is not again
        return [y, *torch.autograd.grad(y, [x_TH, gate_up, down], grad)]

    for mine, expected in zip(run(again=True), run(again=False), strict=True):
        assert torch.equal(mine, expected)


class Counted(TorchDispatchMode):
    """Counts matrix products and copies of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.copies = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += "mm" in str(func)
        self.copies += "index_select" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", [(1,), (2,), (1, 2), (0, 1), (0, 2)], ids=str)
@pytest.mark.parametrize("function", ["per expert", "grouped"])
def test_what_is_frozen_costs_nothing_and_changes_no_other_bit(function: str, frozen: tuple[int, ...]) -> None:
    counts = [3, 0, 5]
    *tensors, grad = _inputs(counts, torch.float32)
    tokens_N = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    source = RowSource(tensors[0].detach()[tokens_N.argsort()], tokens_N)

    def run(frozen: tuple[int, ...]) -> tuple[list[Tensor], Counted]:
        x, gate_up, down = (one.detach().requires_grad_(place not in frozen) for place, one in enumerate(tensors))
        if function == "grouped":
            products = torch_products(torch.tensor(counts))
            y = GroupedSwiGLU.apply(x, gate_up, down, lambda: counts, products, source)
        else:
            y = PerExpertSwiGLU.apply(x, gate_up, down, counts, source)
        with Counted() as counted:
            return list(torch.autograd.grad(y, [one for one in (x, gate_up, down) if one.requires_grad], grad)), counted

    expected, whole = run(())
    found, counted = run(frozen)
    each = 2 if function == "per expert" else 1  # experts that have rows
    assert (whole.products, whole.copies) == (4 * each, 1)
    assert (counted.products, counted.copies) == ((4 - len(frozen)) * each, int(1 not in frozen))
    trained = [one for place, one in enumerate(expected) if place not in frozen]
    for mine, theirs in zip(found, trained, strict=True):
        assert torch.equal(mine, theirs)


def test_idle_experts_get_zero_gradients_even_if_the_kernel_writes_none() -> None:
    counts = [4, 0, 3]
    x, gate_up, down, grad = _inputs(counts, torch.float32)
    products = torch_products(torch.tensor(counts))

    def outer_with_garbage(left: Tensor, right: Tensor) -> Tensor:
        result = products.outer(left, right)
        result[1] = float("nan")
        return result

    garbage = products._replace(outer=outer_with_garbage)
    GroupedSwiGLU.apply(x, gate_up, down, lambda: counts, garbage).backward(grad)
    assert gate_up.grad[1].count_nonzero() == down.grad[1].count_nonzero() == 0
    assert gate_up.grad.isfinite().all()
    assert down.grad.isfinite().all()


@pytest.mark.parametrize("counts", [[2, 3], [0, 4, 1], [0, 0]])
def test_hand_written_backward_passes_gradcheck(counts: list[int]) -> None:
    x, gate_up, down, _ = _inputs(counts, hidden=4, inner=3)
    assert torch.autograd.gradcheck(lambda *t: PerExpertSwiGLU.apply(*t, counts), (x, gate_up, down))


def test_input_without_gradient_and_expanded_output_gradient() -> None:
    counts = [3, 2]
    x, gate_up, down, _ = _inputs(counts, torch.float32)
    PerExpertSwiGLU.apply(x.detach(), gate_up, down, counts).sum().backward()  # sum's gradient has strides of 0
    frozen = gate_up.grad.clone()
    gate_up.grad = None
    loop_ffn(x, counts, gate_up, down).sum().backward()
    torch.testing.assert_close(frozen, gate_up.grad)


def test_auto_says_what_it_chose_and_why() -> None:
    backend, reason = resolve_backend(ExpertsConfig(), CPU, torch.float32, (256, 896))
    assert backend is ExpertBackend.grouped_mm
    assert "CPU" in reason
    loop = ExpertsConfig(backend=ExpertBackend.loop)
    assert resolve_backend(loop, CPU, torch.float32, (256, 896)) == (ExpertBackend.loop, "set by experts.backend")


@pytest.mark.parametrize(
    ("dtype", "shapes", "rule"),
    [(torch.float32, (256, 896), "bfloat16 rows"), (torch.bfloat16, (256, 900), "16-byte aligned")],
)
def test_grouped_mm_that_cannot_run_on_cuda(dtype: torch.dtype, shapes: tuple[int, int], rule: str) -> None:
    backend, reason = resolve_backend(ExpertsConfig(), torch.device("cuda"), dtype, shapes)
    assert backend is ExpertBackend.loop
    assert rule in reason
    asked = ExpertsConfig(backend=ExpertBackend.grouped_mm)
    with pytest.raises(ValueError, match=f"experts.backend=grouped_mm must have {rule}|{rule}"):
        resolve_backend(asked, torch.device("cuda"), dtype, shapes)

"""Grouped SwiGLU: every back-end against the loop in float64, outputs and gradients; the choice of back-end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.config import ExpertBackend, ExpertsConfig
from moe.kernels.expert_backends import resolve_backend
from moe.kernels.expert_swiglu import GroupedSwiGLU, PerExpertSwiGLU
from moe.kernels.grouped_products import per_expert_products, torch_products
from moe.kernels.grouped_swiglu import grouped_ffn, loop_ffn

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
@pytest.mark.parametrize("per_expert", [False, True])
def test_the_gpu_function_over_grouped_mm_and_single_products(
    counts: list[int], dtype: torch.dtype, tolerance: float, per_expert: bool
) -> None:
    """The function that a GPU runs, with the CPU's grouped_mm, which has the same interface and requirements, and with
    one product per expert."""
    tensors = _inputs(counts, dtype)
    exact = _oracle(tensors, counts)
    products = per_expert_products(counts) if per_expert else torch_products(torch.tensor(counts))
    ours = _run(lambda x, g, d: GroupedSwiGLU.apply(x, g, d, lambda: counts, products), tensors)
    for name, mine, reference in zip(("y", "dx", "dgate_up", "ddown"), ours, exact, strict=True):
        assert _relative(mine, reference) <= tolerance, name


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

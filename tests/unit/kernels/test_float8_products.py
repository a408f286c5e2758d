"""Products of float8 factors, against torch's conversions and products in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe.config import ExpertBackend, ExpertsConfig
from moe.config.compose import load_config
from moe.errors import UserError
from moe.kernels.float8_products import quantize, require_float8, rounded
from moe.kernels.grouped_swiglu import grouped_ffn
from moe.sparse.experts import Experts

CPU, H, FF = torch.device("cpu"), 32, 48
COUNTS = {"even": [4, 4, 4], "an idle expert": [7, 0, 2], "one row": [0, 0, 1], "many": [1, 40, 3]}


def _vectors(dtype: torch.dtype = torch.float32) -> Tensor:
    """[2, 41, 32] of sizes from 1e-20 to 1e20."""
    return (torch.randn(2, 41, 32) * torch.logspace(-20, 20, 41).unsqueeze(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_are_the_largest_powers_of_two_that_keep_a_vector_within_448(dtype: torch.dtype) -> None:
    x_BVK = _vectors(dtype)
    values, factor_BV = quantize(x_BVK)
    mantissas, _ = torch.frexp(factor_BV)
    assert (mantissas == 0.5).all()
    largest_BV = x_BVK.float().abs().amax(2) / factor_BV
    assert (largest_BV <= 448).all()
    assert (largest_BV > 224).all()
    assert torch.equal(values, (x_BVK.float() / factor_BV.unsqueeze(2)).to(torch.float8_e4m3fn))


def test_rounded_values_are_exact_in_bfloat16_and_at_most_a_sixteenth_off() -> None:
    x_BVK = _vectors()
    values, factor_BV = quantize(x_BVK)
    seen = rounded(x_BVK, 2)
    assert torch.equal(seen, values.float() * factor_BV.unsqueeze(2))
    assert torch.equal(seen, seen.bfloat16().float())
    # a sixteenth of a value, or half the smallest float8 number
    assert ((seen - x_BVK).abs() <= (x_BVK.abs() / 16).maximum(2.0**-10 * factor_BV.unsqueeze(2))).all()
    assert torch.equal(rounded(x_BVK.transpose(1, 2), 1), seen.transpose(1, 2))


def test_zeros_stay_zeros_and_what_is_not_finite_leaves_nothing_finite() -> None:
    assert torch.equal(rounded(torch.zeros(2, 3), 1), torch.zeros(2, 3))
    for bad in (float("inf"), float("nan")):
        seen = rounded(torch.tensor([[1.0, bad, 0.0], [1.0, 2.0, 3.0]]), 1)
        assert not seen[0].isfinite().any()
        assert torch.equal(seen[1], torch.tensor([1.0, 2.0, 3.0]))


class _Linear(torch.autograd.Function):
    """x Wᵀ of one expert in float64, each factor rounded along the sum that it is in; W's gradient is not."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI, weight_OI)
        return rounded(x_NI, 1) @ rounded(weight_OI, 1).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x_NI, weight_OI = ctx.saved_tensors
        return rounded(grads[0], 1) @ rounded(weight_OI, 0), grads[0].t() @ x_NI


def _reference(x_NH: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
    outputs = []
    for rows, one, other in zip(x_NH.split(counts), gate_up, down, strict=True):
        gate, up = _Linear.apply(rows, one).chunk(2, 1)  # type: ignore[attr-defined]
        outputs.append(_Linear.apply(F.silu(gate) * up, other))
    return torch.cat(outputs)  # type: ignore[arg-type]


def _passes(function: Any, tensors: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_both_passes_equal_the_definition_in_float64(counts: list[int]) -> None:
    tensors = [torch.randn(sum(counts), H), torch.randn(3, 2 * FF, H) / 6, torch.randn(3, H, FF) / 6]
    doubles, dy = [tensor.double() for tensor in tensors], torch.randn(sum(counts), H).double()
    counts_E = torch.tensor(counts)
    backend = ExpertBackend.grouped_mm
    found = _passes(lambda *t: grouped_ffn(t[0], counts_E, t[1], t[2], backend, fp8=True), doubles, dy)
    wanted = _passes(lambda *t: _reference(*t, counts), doubles, dy)
    plain = _passes(lambda *t: grouped_ffn(t[0], counts_E, t[1], t[2], backend), doubles, dy)
    for name, mine, theirs, unrounded in zip(("y", "dx", "dgate_up", "ddown"), found, wanted, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, msg=name)
        assert 0.01 < float((mine - unrounded).norm() / unrounded.norm()) < 0.08, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_row_of_any_expert(dtype: torch.dtype) -> None:
    experts = Experts(H, FF, 3, ExpertsConfig(fp8=True)).to(dtype).train()
    x_NH = torch.zeros(0, H, dtype=dtype, requires_grad=True)
    y_NH = experts(x_NH, torch.zeros(3, dtype=torch.int64))
    y_NH.sum().backward()
    assert experts.gate_up_proj.grad is not None
    assert not experts.gate_up_proj.grad.any()


def test_bfloat16_has_the_same_factors() -> None:
    """Results are rounded to bfloat16, so that some of the next product's factors are other float8 numbers."""
    counts_E, backend = torch.tensor([70, 40, 0]), ExpertBackend.grouped_mm
    tensors = [torch.randn(110, H), torch.randn(3, 2 * FF, H) / 6, torch.randn(3, H, FF) / 6]
    tensors = [tensor.bfloat16() for tensor in tensors]
    found = grouped_ffn(tensors[0], counts_E, *tensors[1:], backend, fp8=True)
    wanted = grouped_ffn(tensors[0].float(), counts_E, *(one.float() for one in tensors[1:]), backend, fp8=True)
    assert found.dtype is torch.bfloat16
    assert float((found - wanted).norm() / wanted.norm()) < 0.03


def test_evaluation_has_no_float8_factors() -> None:
    torch.manual_seed(1)
    with_fp8, without = Experts(H, FF, 2, ExpertsConfig(fp8=True)), Experts(H, FF, 2, ExpertsConfig())
    without.load_state_dict(with_fp8.state_dict())
    x_NH, counts_E = torch.randn(6, H), torch.tensor([2, 4])
    assert torch.equal(with_fp8.eval()(x_NH, counts_E), without(x_NH, counts_E))
    assert not torch.equal(with_fp8.train()(x_NH, counts_E), without(x_NH, counts_E))


def test_where_it_can_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no float8 units" in require_float8(CPU, torch.float32)
    with pytest.raises(UserError, match=r"multiples of 16 as sizes, not hidden and expert size \(256, 900\)"):
        load_config(["experts.fp8=true", "model=small", "model.hidden_size=256", "model.intermediate_size=900"])
    with pytest.raises(UserError, match=r"no effect with model\.mlp=dense"):
        load_config(["experts.fp8=true", "model.mlp=dense"])
    cuda = torch.device("cuda")
    with pytest.raises(UserError, match=r"train\.precision=bfloat16"):
        require_float8(cuda, torch.float32)
    for capability, fits in (((8, 9), False), ((9, 0), True), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        if fits:
            assert require_float8(cuda, torch.bfloat16) == "float8 factors"
        else:
            with pytest.raises(UserError, match=r"compute capability 9 or 10"):
                require_float8(cuda, torch.bfloat16)
    for backend in (ExpertBackend.loop, ExpertBackend.megablocks):
        with pytest.raises(UserError, match=rf"experts\.fp8=true has no experts\.backend={backend.name}"):
            ExpertsConfig(fp8=True, backend=backend)

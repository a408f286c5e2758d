"""A CPU's bfloat16 products: the decision, one rounding either way, and models that compute the same both ways."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe.adapters.attach import attach
from moe.config import AdapterKind
from moe.config.compose import load_config
from moe.kernels import bfloat16_products, float32_products
from moe.kernels.bfloat16_products import NarrowRoute, decide, linear, mm, widens
from moe.kernels.float32_products import LibraryTimes
from moe.kernels.padded_rows import pads
from moe.model.build import build_model
from moe.model.transformer import Transformer
from tests.ranks import run_ranks

CPU = torch.device("cpu")


@pytest.fixture(params=[False, True], ids=["onednn", "widened"])
def widened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(bfloat16_products, "_route", NarrowRoute(request.param, "test"))
    return request.param


@pytest.mark.parametrize(("gain", "taken"), [(0.4, False), (1.1, False), (1.9, True), (8.0, True)])
def test_only_a_clear_gain_is_taken(gain: float, taken: bool) -> None:
    route = decide(LibraryTimes(3e-3, gain * 1e-3), LibraryTimes(3e-3, 1e-3))
    assert route.widened is taken
    assert route.reason == f"float32 is {gain:.1f} × as fast"
    assert str(route).endswith("; train.precision=float32 saves the widening") is taken


def test_a_fast_route_that_is_wrong_is_not_taken() -> None:
    route = decide(LibraryTimes(3e-3, 1.0), LibraryTimes(5e-2, 0.1))
    assert str(route) == (
        "bfloat16 matrix products: oneDNN (widened factors' error is 5e-02 of the largest result, oneDNN's 3e-03)"
    )


def _choices() -> list[bool]:
    return [bfloat16_products._measured_route().widened for _ in range(10)]


def test_a_busy_machine_chooses_as_an_idle_one() -> None:
    """A run that resumes beside others must compute the same. More processes than cores, each choosing ten times."""
    processes = 2 * len(os.sched_getaffinity(0))
    chosen = run_ranks(min(processes, 16), _choices, timeout=120)
    assert len({widened for one in chosen for widened in one}) == 1, chosen


def test_a_product_is_rounded_once_from_a_float32_sum(widened: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).bfloat16() for shape in ((96, 256), (128, 256)))
    exact = a.double() @ b.double().t()
    out = torch.empty(96, 128, dtype=torch.bfloat16)
    for product in (mm(a, b.t()), mm(a, b.t(), out=out), linear(a[None], b)[0]):
        assert product.dtype is torch.bfloat16
        # Half a unit in the last place of 8 binary digits, and what a float32 sum of 256 terms may add to it.
        assert bool(((product.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all())
    assert widens(CPU, torch.bfloat16) is widened
    assert pads(CPU, torch.bfloat16) is not widened or float32_products.uses_onednn()


@pytest.mark.usefixtures("widened")
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("trains", [False, True])
def test_a_linear_layer_of_any_rows_keeps_its_input_for_a_trained_weight_only(rows: int, trains: bool) -> None:
    """An expert without tokens has no rows; a frozen layer's input isn't kept."""
    weight = torch.randn(16, 8).bfloat16().requires_grad_(trains)
    x = torch.randn(rows, 8).bfloat16().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        out = linear(x, weight)
    assert out.shape == (rows, 16)
    assert any(one.shape == x.shape for one in kept) is trains
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_other_dtypes_are_never_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16_products, "_route", NarrowRoute(True, "test"))
    for dtype in (torch.float32, torch.float64, torch.float16):
        assert not widens(CPU, dtype)
    assert not widens(torch.device("meta"), torch.bfloat16)
    x, weight = torch.randn(3, 5, 8), torch.randn(4, 8)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize(
    "overrides",
    [[], ["model.mlp=dense"], ["adapter=lora", "init_from=base"]],
    ids=["sparse", "dense", "adapter of attention and experts"],
)
def test_a_model_computes_the_same_both_ways(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients, compared with float32's from the same weights: no further from them than oneDNN's are."""
    config = load_config(["model=tiny", "train.sequence_length=64", *overrides])
    narrow = build_model(config, CPU)
    if config.adapter.kind is not AdapterKind.none:
        attach(narrow, config.adapter, seed=0)
    for name, weight in narrow.named_parameters():
        if name.endswith("lora.B"):  # zero at the start, which leaves A without a gradient
            torch.nn.init.normal_(weight.data, std=0.02)
    narrow = narrow.to(torch.bfloat16)
    exact = copy.deepcopy(narrow).float()
    ids = torch.randint(config.model.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))

    def loss_and_gradients(model: Transformer) -> tuple[float, list[Tensor]]:
        model.zero_grad()
        loss = model(ids, labels_BS=ids).lm_loss_sum
        loss.backward()
        return loss.item(), [one.grad.double() for one in model.parameters() if one.grad is not None]

    results = []
    for widened in (False, True):
        monkeypatch.setattr(bfloat16_products, "_route", NarrowRoute(widened, "test"))
        results.append(loss_and_gradients(narrow))
    (loss, grads), (other, others) = results
    wanted_loss, wanted = loss_and_gradients(exact)
    assert abs(other - wanted_loss) < max(2 * abs(loss - wanted_loss), 1e-4 * wanted_loss)
    assert len(grads) == len(others) == len(wanted) > 0
    for grad, another, truth in zip(grads, others, wanted, strict=True):
        assert float((another - truth).norm()) <= 1.2 * float((grad - truth).norm())
    assert any(not torch.equal(*pair) for pair in zip(grads, others, strict=True)), "both were computed the same way"

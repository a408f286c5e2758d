"""The library of a CPU's float32 products: the decision, the switch's scope, and a model that computes the same."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from moe.kernels import float32_products
from moe.kernels.float32_products import LibraryTimes, Route, decide
from moe.kernels.padded_rows import pads
from tests.ranks import run_ranks

SWITCH = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
MKL = LibraryTimes(error=5e-7, seconds=1e-3)


@pytest.mark.parametrize(
    ("onednn", "taken", "reason"),
    [
        (LibraryTimes(6e-7, 0.5e-3), True, "2.0 × as fast as MKL"),
        (LibraryTimes(6e-7, 0.9e-3), False, "oneDNN is 1.1 × as fast"),
        (LibraryTimes(2.4e-3, 0.2e-3), False, "oneDNN's error is 2e-03"),
    ],
)
def test_accuracy_comes_before_speed(onednn: LibraryTimes, taken: bool, reason: str) -> None:
    route = decide(MKL, onednn)
    assert route.onednn is taken
    assert route.reason.startswith(reason)


def test_a_choice_is_made_once_and_leaves_the_switch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32_products, "_route", float32_products._UNMEASURED)
    before = SWITCH.fp32_precision
    route = float32_products.choose()
    assert float32_products.choose() is route
    assert str(route).startswith("float32 matrix products: ")
    assert SWITCH.fp32_precision == before


def _choices() -> list[bool]:
    return [float32_products._measured_route().onednn for _ in range(10)]


def test_a_busy_machine_chooses_as_an_idle_one() -> None:
    """A run that resumes beside others must compute the same. More processes than cores, each choosing ten times."""
    processes = 2 * len(os.sched_getaffinity(0))
    chosen = run_ranks(min(processes, 16), _choices, timeout=120)
    assert len({onednn for one in chosen for onednn in one}) == 1, chosen


@pytest.mark.parametrize("onednn", [False, True])
def test_the_switch_is_on_within_the_function_alone(onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32_products, "_route", Route(onednn, "test"))
    before, seen = SWITCH.fp32_precision, []

    @float32_products.float32_products
    def fails(value: int) -> None:
        seen.append((value, SWITCH.fp32_precision))
        raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        fails(3)
    assert seen == [(3, "bf16" if onednn else before)]
    assert SWITCH.fp32_precision == before
    assert pads(torch.device("cpu"), torch.float32) is onednn


BOTH_ROUTES = """
import torch
from moe.config.compose import load_config
from moe.kernels import float32_products
from moe.model.build import build_model

config = load_config(["model=tiny", "train.sequence_length=64"])
model = build_model(config, torch.device("cpu"))
ids = torch.randint(config.model.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
results = []
for onednn in (False, True):
    float32_products._route = float32_products.Route(onednn, "test")
    model.zero_grad()
    loss = model(ids, labels_BS=ids).lm_loss_sum
    loss.backward()
    results.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
(loss, grads), (other, others) = results
assert abs(loss - other) < 1e-6 * loss, (loss, other)
for grad, another in zip(grads, others, strict=True):
    assert (grad - another).abs().max() < 1e-5 * grad.abs().max()
if torch.backends.cpu.get_cpu_capability() != "AVX2":  # without it torch gives oneDNN no float32 products
    assert any(not torch.equal(*pair) for pair in zip(grads, others)), "the same library computed both"
"""


def test_both_libraries_compute_the_same_model() -> None:
    """Without AMX units, which oneDNN would use for products of rounded factors."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", BOTH_ROUTES], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr

"""`moe.engine.base`, tested for every engine on one rank; tests/distributed/test_engine.py has more ranks.

A small linear model, whose gradients are known, and Mixtral where experts matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.config import Config, EngineKind
from moe.distributed import rendezvous
from moe.engine import build_engine, prepare
from moe.engine.base import ADAM_MOMENTS, Engine, SkipReason, States, StepResult
from tests.distributed.training import around_two_steps, config_of
from tests.ranks import run_ranks

LR, ACCUMULATION = 1e-2, 4
KINDS = ("weights", *ADAM_MOMENTS)
NAN, INF = float("nan"), float("inf")
each_engine = pytest.mark.parametrize("kind", [kind.name for kind in EngineKind])
each_precision = pytest.mark.parametrize("precision", ["float32", "bfloat16"])


class _Linear(nn.Module):
    """x → (w + frozen) · x + b, summed; the gradient of w and b doesn't depend on them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.bias = nn.Parameter(torch.randn(3, generator=generator))
        self.frozen = nn.Parameter(torch.randn(3, 4, generator=generator), requires_grad=False)

    def forward(self, x_4: Tensor) -> Tensor:
        return ((self.weight + self.frozen) @ x_4.to(self.weight.dtype) + self.bias).float().sum()


def _config(kind: str, precision: str, *overrides: str) -> Config:
    return config_of([f"engine={kind}", f"train.precision={precision}", "optim.max_grad_norm=1e9", *overrides])


def _engine(config: Config) -> Engine:
    mesh = prepare(config, rendezvous.start(1))
    return build_engine(_Linear(), config, mesh)


def _inputs(step: int) -> Tensor:
    """[micro-batch, 4], exact in bfloat16, as are their sums."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(-8, 8, (ACCUMULATION, 4), generator=generator) / 8


def _step(engine: Engine, step: int, factors: tuple[float, ...] = (1, 1, 1, 1), **limits: float) -> StepResult:
    """One optimizer step; each micro-batch's loss is multiplied by its factor."""
    assert engine.accumulation == ACCUMULATION
    results = []
    for x_4, factor in zip(_inputs(step), factors, strict=True):
        engine.backward(engine(x_4) * factor)
        results.append(engine.step(LR, **limits))
    assert results[:-1] == [None] * (ACCUMULATION - 1)
    assert results[-1] is not None
    return results[-1]


def _gradient(step: int) -> dict[str, Tensor]:
    return {"weight": _inputs(step).mean(0).expand(3, 4), "bias": torch.ones(3)}


def _norm(gradient: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in gradient.values()))


def _model(engine: Engine) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def _same(a: States, b: States) -> bool:
    return a.keys() == b.keys() and all(_equal(a[kind], b[kind]) for kind in a)


@dataclass
class Seen:
    """After a step: its result, the optimizer's state and the model's weights."""

    result: StepResult
    state: States
    model: dict[str, Tensor]


def _seen(engine: Engine, step: int, *arguments: Any, **limits: float) -> Seen:
    result = _step(engine, step, *arguments, **limits)
    return Seen(result, engine.optimizer_state.gather(), _model(engine))


def _first_steps(kind: str, precision: str, overrides: list[str]) -> list[Seen]:
    engine = _engine(_config(kind, precision, *overrides))
    return [_seen(engine, step) for step in range(2)]


@each_engine
@each_precision
def test_the_gradient_is_the_mean_over_micro_batches(kind: str, precision: str) -> None:
    first, second = run_ranks(1, _first_steps, kind, precision, [])[0]
    for step, seen in enumerate((first, second)):
        assert seen.result.skipped is None
        assert seen.result.grad_norm == pytest.approx(_norm(_gradient(step)), rel=1e-6)
    for name, gradient in _gradient(0).items():
        torch.testing.assert_close(first.state["exp_avg"][name], 0.1 * gradient, rtol=1e-6, atol=0)
        torch.testing.assert_close(first.state["exp_avg_sq"][name], 0.05 * gradient.square(), rtol=1e-5, atol=0)
        then = 0.9 * 0.1 * gradient + 0.1 * _gradient(1)[name]
        torch.testing.assert_close(second.state["exp_avg"][name], then, rtol=1e-5, atol=1e-8)


@each_engine
@each_precision
def test_adamw_decays_matrices_alone(kind: str, precision: str) -> None:
    """Equation 12 of arXiv 1711.05101 on the known gradient: Adam's first update has the gradient's sign alone."""
    first = run_ranks(1, _first_steps, kind, precision, [])[0][0]
    start = dict(_Linear().named_parameters())
    for name, decay in (("weight", 0.1), ("bias", 0.0)):
        before = start[name].detach()
        before = before.bfloat16().float() if precision == "bfloat16" else before
        expected = before * (1 - LR * decay) - LR * _gradient(0)[name].sign()
        torch.testing.assert_close(first.state["weights"][name], expected, rtol=1e-5, atol=1e-6)


@each_engine
@each_precision
def test_the_model_has_the_optimizers_weights_and_the_frozen_one_stays(kind: str, precision: str) -> None:
    frozen = _Linear().frozen.detach()
    for seen in run_ranks(1, _first_steps, kind, precision, [])[0]:
        assert seen.state.keys() == set(KINDS)
        dtype = getattr(torch, precision)
        assert torch.equal(seen.model.pop("frozen"), frozen.to(dtype))
        for kind_ in KINDS:
            assert seen.state[kind_].keys() == {"weight", "bias"}
            assert all(tensor.dtype == torch.float32 for tensor in seen.state[kind_].values())
        assert _equal(seen.model, {name: tensor.to(dtype) for name, tensor in seen.state["weights"].items()})
        rounded = {name: tensor.bfloat16().float() for name, tensor in seen.state["weights"].items()}
        assert not _equal(rounded, seen.state["weights"]), "the optimizer's weights carry only bfloat16's digits"


@each_engine
@each_precision
def test_clipping_is_by_the_norm_over_all_parameters(kind: str, precision: str) -> None:
    norm = _norm(_gradient(0))
    limit = norm / 4
    clipped = run_ranks(1, _first_steps, kind, precision, [f"optim.max_grad_norm={limit}"])[0][0]
    assert clipped.result.grad_norm == pytest.approx(norm, rel=1e-6), "the norm is that before clipping"
    for name, gradient in _gradient(0).items():
        torch.testing.assert_close(clipped.state["exp_avg"][name], 0.1 * gradient / 4, rtol=1e-5, atol=0)


BAD: dict[str, tuple[tuple[float, ...], dict[str, float], SkipReason]] = {
    # name → (factors of the micro-batches' losses, limits, why the step is skipped)
    "NaN loss": ((1, NAN, 1, 1), {}, SkipReason.not_finite),
    "infinite loss": ((INF, 1, 1, 1), {}, SkipReason.not_finite),
    "NaN loss in the last micro-batch": ((1, 1, 1, NAN), {"norm_limit": 1e9}, SkipReason.not_finite),
    "gradient too large for a norm": ((1e38, 1e38, 1e38, 1e38), {}, SkipReason.not_finite),
    "spike": ((100, 1, 1, 1), {"norm_limit": 10.0}, SkipReason.spike),
}


@dataclass
class Skipped:
    before: Seen
    bad: Seen
    after: Seen
    never: Seen  # the same as `after`, in a run without the bad step
    infinite_loss_finite_gradient: StepResult
    counts: list[int]


def _skipping(kind: str, precision: str) -> dict[str, Skipped]:
    found = {}
    for name, (factors, limits, _) in BAD.items():
        engine, without = (_engine(_config(kind, precision)) for _ in range(2))
        counts = [engine.skipped_steps]
        before = _seen(engine, 0)
        bad = _seen(engine, 1, factors, **limits)
        counts.append(engine.skipped_steps)
        after = _seen(engine, 2, norm_limit=1e9)
        counts.append(engine.skipped_steps)
        _step(without, 0)
        never = _seen(without, 2)
        for x_4 in _inputs(3):
            engine.backward(engine(x_4) + INF)
            result = engine.step(LR)
        assert result is not None
        found[name] = Skipped(before, bad, after, never, result, [*counts, engine.skipped_steps])
    return found


@each_engine
@each_precision
def test_a_skipped_step_moves_nothing(kind: str, precision: str) -> None:
    for name, found in run_ranks(1, _skipping, kind, precision)[0].items():
        expected = BAD[name][2]
        assert found.bad.result.skipped is expected, name
        assert math.isnan(found.bad.result.grad_norm) == (expected is SkipReason.not_finite), name
        assert _same(found.bad.state, found.before.state), name
        assert _equal(found.bad.model, found.before.model), name
        # Adam's step count too: it corrects the moments' bias in the next update.
        assert _same(found.after.state, found.never.state), name
        assert found.after.result == found.never.result, name
        assert found.infinite_loss_finite_gradient.skipped is SkipReason.not_finite
        assert found.counts == [0, 1, 1, 2], name


def _first_step_skipped(kind: str, precision: str) -> tuple[States, States]:
    engine, without = (_engine(_config(kind, precision)) for _ in range(2))
    _step(engine, 0, (NAN, 1, 1, 1))
    _step(engine, 1)
    _step(without, 1)
    return engine.optimizer_state.gather(), without.optimizer_state.gather()


@each_engine
@each_precision
def test_a_skipped_first_step_moves_nothing(kind: str, precision: str) -> None:
    assert _same(*run_ranks(1, _first_step_skipped, kind, precision)[0])


def _gathered_in_parts(kind: str) -> tuple[dict[str, int], States, States, States, States]:
    engine = _engine(_config(kind, "float32"))
    fresh = engine.optimizer_state.gather()
    _step(engine, 0)
    then = engine.optimizer_state.gather()
    some = engine.optimizer_state.gather({("exp_avg", "bias"), ("weights", "weight")})
    untouched = {kind: {name: tensor.clone() for name, tensor in tensors.items()} for kind, tensors in then.items()}
    _step(engine, 1)
    return engine.optimizer_state.sizes(), fresh, then, untouched, some


@each_engine
def test_gathered_state_is_a_copy_and_only_what_is_kept(kind: str) -> None:
    sizes, fresh, then, untouched, some = run_ranks(1, _gathered_in_parts, kind)[0]
    assert sizes == {"weight": 12, "bias": 3}
    assert _same(then, untouched), "a later step changed what was gathered before it"
    assert all(not fresh[moment][name].any() for moment in ADAM_MOMENTS for name in sizes)
    assert {(kind, name) for kind, tensors in some.items() for name in tensors} == {
        ("exp_avg", "bias"),
        ("weights", "weight"),
    }
    assert torch.equal(some["exp_avg"]["bias"], then["exp_avg"]["bias"])


def _into(engine: Engine, state: States, adam_steps: int, steps: int, skipped_steps: int) -> None:
    parts = []
    for part in engine.optimizer_state.empty(max_bytes=1):  # one parameter in each
        for kind, tensors in part.items():
            for name, tensor in tensors.items():
                tensor.copy_(state[kind][name])
        parts.append(part)
    assert [len(part["weights"]) for part in parts] == [1] * len(state["weights"])
    engine.optimizer_state.fill(parts, adam_steps)
    engine.resumed(steps, skipped_steps)


def _saved_and_resumed(saver: str, other: str, precision: str) -> tuple[list[Seen], list[Seen], int]:
    """Steps 3 and 4 of a run that goes on, and of one that is resumed; and the latter's skipped steps."""
    saving = _engine(_config(saver, precision))
    _step(saving, 0)
    _step(saving, 1, (NAN, 1, 1, 1))
    _step(saving, 2)
    state = saving.optimizer_state.gather()
    resumed = _engine(_config(other, precision))
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            if parameter.requires_grad:
                parameter.zero_()  # weights that a load leaves out are noticed
    _into(resumed, state, adam_steps=2, steps=3, skipped_steps=1)
    skipped = resumed.skipped_steps
    return [_seen(saving, step) for step in (3, 4)], [_seen(resumed, step) for step in (3, 4)], skipped


@pytest.mark.parametrize("saver", [kind.name for kind in EngineKind])
@pytest.mark.parametrize("other", [kind.name for kind in EngineKind])
@each_precision
def test_any_engine_resumes_what_any_engine_saved(saver: str, other: str, precision: str) -> None:
    went_on, resumed, skipped = run_ranks(1, _saved_and_resumed, saver, other, precision)[0]
    assert skipped == 1
    for a, b in zip(went_on, resumed, strict=True):
        assert a.result.skipped is b.result.skipped is None
        if saver == other:
            assert _same(a.state, b.state)
            assert _equal(a.model, b.model)
        for kind, tensors in a.state.items():
            for name, tensor in tensors.items():
                torch.testing.assert_close(b.state[kind][name], tensor, rtol=1e-6, atol=1e-8)


@each_engine
def test_an_expert_without_tokens_has_a_zero_gradient(kind: str) -> None:
    """Its moments stay zero; weight decay alone moves its weights."""
    before, after = run_ranks(1, around_two_steps, [f"engine={kind}"], [1])[0]
    config = config_of([])
    kept = (1 - config.optim.lr * config.optim.weight_decay) ** 2
    experts = [name for name in after["weights"] if ".experts." in name]
    assert experts
    for name in experts:
        for moment in ADAM_MOMENTS:
            assert not after[moment][name][1].any()
            assert after[moment][name].any(), "no expert had a gradient"
        torch.testing.assert_close(after["weights"][name][1], before["weights"][name][1] * kept, rtol=1e-6, atol=0)


class _Unused(_Linear):
    """Has a parameter that no loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2, 2))


def _unused(kind: str, precision: str) -> tuple[States, float]:
    config = _config(kind, precision)
    engine = build_engine(_Unused(), config, prepare(config, rendezvous.start(1)))
    norm = _step(engine, 0).grad_norm
    return engine.optimizer_state.gather(), norm


@each_engine
@each_precision
def test_a_parameter_that_no_loss_depends_on_has_a_zero_gradient(kind: str, precision: str) -> None:
    state, norm = run_ranks(1, _unused, kind, precision)[0]
    assert norm == pytest.approx(_norm(_gradient(0)), rel=1e-6)
    assert not state["exp_avg"]["unused"].any()
    torch.testing.assert_close(state["weights"]["unused"], torch.full((2, 2), 1 - LR * 0.1), rtol=1e-6, atol=0)


def _sums(kind: str) -> States:
    """Gradients of 256, 1, 1 and 1: their sum needs more digits than bfloat16 has."""
    engine = _engine(_config(kind, "bfloat16"))
    for factor in (256.0, 1.0, 1.0, 1.0):
        engine.backward(engine(torch.ones(4)) * factor * ACCUMULATION)
        engine.step(LR)
    return engine.optimizer_state.gather()


@each_engine
def test_bfloat16_gradients_are_summed_in_float32(kind: str) -> None:
    state = run_ranks(1, _sums, kind)[0]
    for name in ("weight", "bias"):
        torch.testing.assert_close(state["exp_avg"][name], torch.full_like(state["exp_avg"][name], 25.9))

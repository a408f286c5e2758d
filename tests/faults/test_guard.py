"""Row 6: a loss or a gradient that is not finite, or far too large, on one rank: no rank's training moves by it.

One launch of two ranks runs all cases: precision × ZeRO stage × expert-parallel degree × fault. What a refused step
must leave behind is nothing: the run is compared, bit by bit, with one that never made that step.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.checkpoint.state import TrainState
from moe.config import Config
from moe.config.train import GuardConfig
from moe.distributed.mesh import Mesh
from moe.engine.base import SkipReason
from moe.engine.deepspeed.engine import DeepSpeedEngine
from moe.train.guard import Guard
from moe.train.objective import training_step
from tests.distributed.training import build, config_of, micro_batches
from tests.e2e.conftest import SMALL, command, environment, read_metrics
from tests.faults.inject import strike
from tests.ranks import run_ranks

STEPS, BAD = 7, 5  # steps, and the one that is refused, from 0: the guard's window of 8 holds half by then
FAULTS: dict[str, dict[str, Any]] = {
    "NaN loss": {"kind": "nan_loss"},
    "infinite loss, finite gradients": {"kind": "inf_loss"},
    "infinite gradient": {"kind": "inf_gradient"},
    "infinite expert gradient": {"kind": "inf_gradient", "parameter": "experts.down_proj"},
    "spike": {"kind": "spike", "factor": 1e4},
}
Setup = tuple[str, int, int]  # precision, ZeRO stage, expert-parallel degree
QUICK: tuple[Setup, ...] = (("float32", 1, 1), ("float32", 2, 2), ("bfloat16", 1, 2), ("bfloat16", 2, 1))
SLOW: tuple[Setup, ...] = tuple(set(itertools.product(["float32", "bfloat16"], [1, 2], [1, 2])) - set(QUICK))
NAME = "{0[0]}, ZeRO-{0[1]}, EP {0[2]}".format
every_setup = pytest.mark.parametrize(
    "setup",
    [*QUICK, *(pytest.param(setup, marks=pytest.mark.slow) for setup in sorted(SLOW))],
    ids=NAME,
)


@dataclass
class Made:
    """What one run of STEPS came to on this rank."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    refused: list[SkipReason | None] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)  # what the bad step changed
    state: dict[str, Tensor] = field(default_factory=dict)


def _everything(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Master weights, moments, Adam's steps, and the weights that the model computes with."""
    found = {
        f"{kind} {name}": t for kind, tensors in engine.optimizer_state.gather().items() for name, t in tensors.items()
    }
    found |= {f"model {name}": parameter.detach().clone() for name, parameter in engine.model.named_parameters()}
    for group, content in enumerate(engine._zero.optimizer.param_groups):
        for index, parameter in enumerate(content["params"]):
            found[f"Adam's step {group} {index}"] = engine._zero.optimizer.state[parameter]["step"].clone()
    return found


def _differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def _made(config: Config, fault: dict[str, Any] | None, bad: int = BAD, watch: bool = True) -> Made:
    """With `fault`, on rank 1 at step `bad`; without, that step is never made."""
    mesh, engine = build(config)
    made = Made()
    guard = Guard(GuardConfig(spike_sigmas=6.0, spike_window=8), TrainState(), mesh, made.warnings.append)
    originals = DeepSpeedEngine.backward, DeepSpeedEngine.__call__
    if fault is not None:
        strike({**fault, "rank": 1, "steps": [bad + 1]}, mesh.rank)
    try:
        for step in range(STEPS):
            if step == bad and fault is None:
                continue
            watched = watch and step == bad
            before = _everything(engine) if watched else {}
            _step(config, mesh, engine, guard, made, step)
            if watched:
                made.moved = _differ(before, _everything(engine))
    finally:
        DeepSpeedEngine.backward, DeepSpeedEngine.__call__ = originals
    made.state = _everything(engine)
    return made


def _step(config: Config, mesh: Mesh, engine: DeepSpeedEngine, guard: Guard, made: Made, step: int) -> None:
    size = config.train.global_batch_size
    batches = micro_batches(config, step)[mesh.rank :: mesh.world_size]
    limit = guard.norm_limit()
    done = training_step(config, mesh, engine, batches, step=step, lr=config.optim.lr, norm_limit=limit)
    made.losses += [loss.item() for loss, _ in done.losses]
    guard._state.step = step + 1
    guard.judge(done.result, range(step * size, (step + 1) * size), done.losses)
    made.norms.append(done.result.grad_norm)
    made.refused.append(done.result.skipped)


@dataclass
class Case:
    """One set-up on one rank. A run's `state` holds, for each fault, only what differs from `never`'s."""

    never: Made  # the run without the bad step
    faulty: dict[str, Made]
    first: list[str]  # what differs after a run whose first step was refused
    torn: tuple[SkipReason | None, list[str]]  # of a step for which the ranks had other limits: decision, what moved


class _OwnLimit(Guard):
    """Against the contract: rank 1's limit is crossed, rank 0's isn't."""

    def norm_limit(self) -> float:
        self._limit = 1e-9 if self._mesh.rank == 1 else 1e9
        return self._limit


def _case(config: Config) -> Case:
    never = _made(config, None)
    faulty = {name: _made(config, fault) for name, fault in FAULTS.items()}
    for made in faulty.values():
        made.state = {name: torch.empty(0) for name in _differ(made.state, never.state)}
    never.state = {}
    late = _made(config, FAULTS["NaN loss"], bad=0, watch=False)
    assert late.refused == [SkipReason.not_finite, *[None] * (STEPS - 1)]
    first = _differ(late.state, _made(config, None, bad=0).state)

    mesh, engine = build(config)
    torn, before = Made(), _everything(engine)
    guard = _OwnLimit(GuardConfig(spike_sigmas=6.0), TrainState(), mesh, torn.warnings.append)
    _step(config, mesh, engine, guard, torn, 0)
    return Case(never, faulty, first, (torn.refused[0], _differ(before, _everything(engine))))


def _cases(configs: list[Config]) -> list[Case]:
    return [_case(config) for config in configs]


@cache
def launched(setups: tuple[Setup, ...]) -> dict[Setup, tuple[Case, Case]]:
    """Each set-up's two ranks."""
    overrides = [
        [f"train.precision={p}", f"parallel.zero_stage={z}", f"parallel.expert_parallel_size={e}"] for p, z, e in setups
    ]
    first, second = run_ranks(2, _cases, [config_of(one) for one in overrides], timeout=240)
    return {setup: (first[i], second[i]) for i, setup in enumerate(setups)}


def ranks_of(setup: Setup) -> tuple[Case, Case]:
    return launched(QUICK if setup in QUICK else SLOW)[setup]


@pytest.mark.fault(6)
@pytest.mark.parametrize("fault", FAULTS)
@every_setup
def test_a_bad_step_on_one_rank_moves_nothing(setup: Setup, fault: str) -> None:
    reason = SkipReason.spike if fault == "spike" else SkipReason.not_finite
    cases = ranks_of(setup)
    for case in cases:
        made, never = case.faulty[fault], case.never
        assert never.refused == [None] * (STEPS - 1), "the undisturbed run"
        assert made.refused == [reason if step == BAD else None for step in range(STEPS)]
        assert made.moved == []
        assert list(made.state) == [], "not where a run without that step came to"
        per_step = len(made.losses) // STEPS
        assert made.losses[: BAD * per_step] == never.losses[: BAD * per_step]
        assert made.losses[(BAD + 1) * per_step :] == never.losses[BAD * per_step :]
        assert math.isfinite(made.norms[BAD]) == (reason is SkipReason.spike)
        assert made.norms[:BAD] + made.norms[BAD + 1 :] == never.norms
        assert len(made.warnings) == 1
    # Eight samples a step, two a micro-batch, and rank 1 has the second and the fourth micro-batch.
    where = "samples 42–43 (rank 1), samples 46–47 (rank 1)" if "loss" in fault else "samples 40–47"
    for case in cases:
        assert case.faulty[fault].warnings[0].endswith(f" on {where}; the update is skipped on every rank")
    if fault == "spike":
        norms = [case.faulty[fault].norms[BAD] for case in cases]
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)


@pytest.mark.fault(6)
@pytest.mark.parametrize("setups", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["quick", "slow"])
def test_what_the_grid_came_to(setups: tuple[Setup, ...], outcome: Callable[[str], None]) -> None:
    runs = [made for cases in launched(setups).values() for case in cases for made in case.faulty.values()]
    assert all(not made.moved and not made.state for made in runs)
    outcome(f"{len(FAULTS)} faults × {', '.join(NAME(setup) for setup in setups)}: nothing moved, the rest is bitwise")


@pytest.mark.fault(6)
@every_setup
def test_the_very_first_step_can_be_refused(setup: Setup) -> None:
    """Before any update there are no moments yet."""
    assert [case.first for case in ranks_of(setup)] == [[], []]


@pytest.mark.fault(6)
@every_setup
def test_ranks_that_would_judge_otherwise_still_decide_together(setup: Setup) -> None:
    assert [case.torn for case in ranks_of(setup)] == [(SkipReason.spike, [])] * 2


@pytest.mark.fault(6)
def test_a_run_goes_on_after_one_bad_step_and_stops_after_three_in_a_row(
    corpus: list[str], tmp_path: Path, outcome: Callable[[str], None]
) -> None:
    overrides = ["train", f"run_dir={tmp_path}", *corpus, *SMALL, "guard.max_skipped=3", "checkpoint.every=8"]
    done = _injected({"kind": "nan_loss", "rank": 1, "steps": [3, 7, 8, 9]}, overrides, ranks=2)
    assert done.returncode == 1, "torchrun's own"
    assert "exitcode  : 2" in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("moe:")]
    # Four samples a step, two on each rank.
    assert "step 9: 3 steps in a row were refused (guard.max_skipped=3): step 7 samples 26–27 (rank 1); step 8" in line
    assert "step 9 samples 34–35 (rank 1). The weights are those of step 6." in line
    assert "OVERFLOW" not in done.stdout + done.stderr
    assert [text.split(":")[1] for text in done.stdout.splitlines() if text.startswith("warning:")] == [
        f" step {step}" for step in (3, 7, 8, 9)
    ]
    metrics = read_metrics(tmp_path)
    assert [line["skipped_steps"] for line in metrics] == [0, 0, 1, 1, 1, 1, 2, 3, 4]
    for line in metrics:
        bad = line["step"] in (3, 7, 8, 9)
        assert [line[key] is None for key in ("loss", "lm_loss", "grad_norm")] == [bad] * 3
        assert line["max_violation"] is not None
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    outcome("one bad step: the run goes on; three in a row: exit code 2, one line with steps, samples and rank")


@pytest.mark.fault(6)
@pytest.mark.slow
def test_a_resume_counts_on_and_meets_the_same_samples(corpus: list[str], tmp_path: Path) -> None:
    overrides = [
        "train",
        f"run_dir={tmp_path}",
        *corpus,
        *SMALL,
        "guard.max_skipped=3",
        "checkpoint.every=8",
        "train.steps=12",
    ]
    fault = {"kind": "nan_loss", "steps": [7, 8, 9]}
    first, again = _injected(fault, overrides), _injected(fault, overrides)
    (text,) = [line for line in first.stderr.splitlines() if line.startswith("moe: step 9: 3 steps in a row")]
    assert first.returncode == again.returncode == 2
    assert "resuming from" in again.stdout
    assert "moe: step 9: 3 steps in a row" in again.stderr, "step 8's checkpoint knows of two refused steps"
    assert text.endswith("raise guard.max_skipped to pass over them")
    passed = _injected(fault, [*overrides, "guard.max_skipped=4"])
    assert passed.returncode == 0, passed.stderr
    assert [line["skipped_steps"] for line in read_metrics(tmp_path)] == [0] * 6 + [1, 2, 3, 3, 3, 3]


def _injected(fault: dict[str, Any], overrides: list[str], ranks: int = 1) -> subprocess.CompletedProcess[str]:
    started = command(tuple(overrides), ranks)
    started[started.index("moe")] = "tests.faults.inject"
    more = environment({"FAULT": json.dumps(fault)})
    return subprocess.run(started, capture_output=True, text=True, timeout=120, env=more, check=False)

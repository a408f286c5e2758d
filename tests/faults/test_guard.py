"""Row 6: a loss or gradient on one rank that is not finite or far too large changes no rank's training state.

One launch of two ranks runs all cases: precision × ZeRO stage × expert-parallel size × fault. A skipped step must leave
no trace: the run is compared bitwise with one in which that step doesn't exist.
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
from tests import forkserver
from tests.distributed.training import build, config_of, micro_batches
from tests.e2e.conftest import SMALL, command, environment, read_metrics
from tests.faults.inject import inject
from tests.ranks import run_ranks

STEPS, BAD = 7, 5  # steps, and the one that is skipped, from 0; the guard's window of 8 is half full by then
FAULTS: dict[str, dict[str, Any]] = {
    "NaN loss": {"kind": "nan_loss"},
    "infinite loss, finite gradients": {"kind": "inf_loss"},
    "infinite gradient": {"kind": "inf_gradient"},
    "infinite expert gradient": {"kind": "inf_gradient", "parameter": "experts.down_proj"},
    "spike": {"kind": "spike", "factor": 1e4},
}
Setup = tuple[str, int, int]  # precision, ZeRO stage, expert-parallel size
QUICK: tuple[Setup, ...] = (("float32", 2, 1), ("bfloat16", 1, 2))  # both of DeepSpeed's optimizer classes
SLOW: tuple[Setup, ...] = tuple(set(itertools.product(["float32", "bfloat16"], [1, 2], [1, 2])) - set(QUICK))
NAME = "{0[0]}, ZeRO-{0[1]}, EP {0[2]}".format
every_setup = pytest.mark.parametrize(
    "setup",
    [*QUICK, *(pytest.param(setup, marks=pytest.mark.slow) for setup in sorted(SLOW))],
    ids=NAME,
)


@dataclass
class Result:
    """What one run of STEPS gave on this rank."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped: list[SkipReason | None] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)  # names of the tensors that the bad step changed
    state: dict[str, Tensor] = field(default_factory=dict)


def _everything(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Master weights, Adam's moments and step counts, and the weights that the model computes with."""
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


def _train(config: Config, fault: dict[str, Any] | None, bad: int = BAD, watch: bool = True) -> Result:
    """A run with `fault` on rank 1 at step `bad`; with no fault, a run that leaves step `bad` out."""
    mesh, engine = build(config)
    run = Result()
    guard = Guard(GuardConfig(spike_sigmas=6.0, spike_window=8), TrainState(), mesh, run.warnings.append)
    originals = DeepSpeedEngine.backward, DeepSpeedEngine.__call__
    if fault is not None:
        inject({**fault, "rank": 1, "steps": [bad + 1]}, mesh.rank)
    try:
        for step in range(STEPS):
            if step == bad and fault is None:
                continue
            watched = watch and step == bad
            before = _everything(engine) if watched else {}
            _step(config, mesh, engine, guard, run, step)
            if watched:
                run.moved = _differ(before, _everything(engine))
    finally:
        DeepSpeedEngine.backward, DeepSpeedEngine.__call__ = originals
    run.state = _everything(engine)
    return run


def _step(config: Config, mesh: Mesh, engine: DeepSpeedEngine, guard: Guard, run: Result, step: int) -> None:
    size = config.train.global_batch_size
    batches = micro_batches(config, step)[mesh.rank :: mesh.world_size]
    limit = guard.norm_limit()
    done = training_step(config, mesh, engine, batches, step=step, lr=config.optim.lr, norm_limit=limit)
    run.losses += [loss.item() for loss, _ in done.losses]
    guard._state.step = step + 1
    guard.judge(done.result, range(step * size, (step + 1) * size), done.losses)
    run.norms.append(done.result.grad_norm)
    run.skipped.append(done.result.skipped)


@dataclass
class Case:
    """All runs of one set-up on one rank. In `faulty`, `state` holds only the tensors that differ from `without`'s."""

    without: Result  # the run without the bad step
    faulty: dict[str, Result]
    first: list[str]  # what differs after a run whose first step was skipped
    # Of a step with another limit on each rank: the decision, and the tensors that changed.
    disagreed: tuple[SkipReason | None, list[str]]


class _OwnLimit(Guard):
    """Breaks the contract: the norm exceeds rank 1's limit and not rank 0's."""

    def norm_limit(self) -> float:
        self._limit = 1e-9 if self._mesh.rank == 1 else 1e9
        return self._limit


def _case(config: Config) -> Case:
    without = _train(config, None)
    faulty = {name: _train(config, fault) for name, fault in FAULTS.items()}
    for run in faulty.values():
        run.state = {name: torch.empty(0) for name in _differ(run.state, without.state)}
    without.state = {}
    late = _train(config, FAULTS["NaN loss"], bad=0, watch=False)
    assert late.skipped == [SkipReason.not_finite, *[None] * (STEPS - 1)]
    first = _differ(late.state, _train(config, None, bad=0).state)

    mesh, engine = build(config)
    split, before = Result(), _everything(engine)
    guard = _OwnLimit(GuardConfig(spike_sigmas=6.0), TrainState(), mesh, split.warnings.append)
    _step(config, mesh, engine, guard, split, 0)
    return Case(without, faulty, first, (split.skipped[0], _differ(before, _everything(engine))))


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
def test_a_bad_step_on_one_rank_changes_nothing(setup: Setup, fault: str) -> None:
    reason = SkipReason.spike if fault == "spike" else SkipReason.not_finite
    cases = ranks_of(setup)
    for case in cases:
        run, without = case.faulty[fault], case.without
        assert without.skipped == [None] * (STEPS - 1), "the undisturbed run"
        assert run.skipped == [reason if step == BAD else None for step in range(STEPS)]
        assert run.moved == []
        assert list(run.state) == [], "the final state isn't that of the run without the step"
        per_step = len(run.losses) // STEPS
        assert run.losses[: BAD * per_step] == without.losses[: BAD * per_step]
        assert run.losses[(BAD + 1) * per_step :] == without.losses[BAD * per_step :]
        assert math.isfinite(run.norms[BAD]) == (reason is SkipReason.spike)
        assert run.norms[:BAD] + run.norms[BAD + 1 :] == without.norms
        assert len(run.warnings) == 1
    # A step has eight samples, a micro-batch two, and rank 1 has the second and the fourth micro-batch.
    where = "samples 42–43 (rank 1), samples 46–47 (rank 1)" if "loss" in fault else "samples 40–47"
    for case in cases:
        assert case.faulty[fault].warnings[0].endswith(f" on {where}; the update is skipped on every rank")
    if fault == "spike":
        norms = [case.faulty[fault].norms[BAD] for case in cases]
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)


@pytest.mark.fault(6)
@pytest.mark.parametrize("setups", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["quick", "slow"])
def test_the_whole_grid_of_faults_changes_nothing(setups: tuple[Setup, ...], outcome: Callable[[str], None]) -> None:
    runs = [run for cases in launched(setups).values() for case in cases for run in case.faulty.values()]
    assert all(not run.moved and not run.state for run in runs)
    names = ", ".join(NAME(setup) for setup in setups)
    outcome(f"{len(FAULTS)} faults × {names}: no tensor changed, the other steps bitwise equal")


@pytest.mark.fault(6)
@every_setup
def test_the_first_step_can_be_skipped(setup: Setup) -> None:
    """Adam has no moments yet then."""
    assert [case.first for case in ranks_of(setup)] == [[], []]


@pytest.mark.fault(6)
@every_setup
def test_ranks_with_different_limits_still_decide_alike(setup: Setup) -> None:
    assert [case.disagreed for case in ranks_of(setup)] == [(SkipReason.spike, [])] * 2


@pytest.mark.fault(6)
def test_a_run_continues_after_one_bad_step_and_stops_after_three_in_a_row(
    corpus: list[str], tmp_path: Path, outcome: Callable[[str], None]
) -> None:
    overrides = ["train", f"run_dir={tmp_path}", *corpus, *SMALL, "guard.max_skipped=3", "checkpoint.every=8"]
    done = _injected({"kind": "nan_loss", "rank": 1, "steps": [3, 7, 8, 9]}, overrides, ranks=2)
    assert done.returncode == 1, "torchrun's exit code"
    assert "exitcode  : 2" in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("moe:")]
    # A step has four samples, two on each rank.
    assert "step 9: 3 steps in a row were skipped (guard.max_skipped=3): step 7 samples 26–27 (rank 1); step 8" in line
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
    outcome("one bad step: the run continues; three in a row: exit code 2, one line with steps, samples and rank")


@pytest.mark.fault(6)
@pytest.mark.slow
def test_a_resume_continues_the_count_and_meets_the_same_samples(corpus: list[str], tmp_path: Path) -> None:
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
    assert "moe: step 9: 3 steps in a row" in again.stderr, "the checkpoint of step 8 counts two skipped steps"
    assert text.endswith("raise guard.max_skipped to continue past them")
    continued = _injected(fault, [*overrides, "guard.max_skipped=4"])
    assert continued.returncode == 0, continued.stderr
    assert [line["skipped_steps"] for line in read_metrics(tmp_path)] == [0] * 6 + [1, 2, 3, 3, 3, 3]


def _injected(fault: dict[str, Any], overrides: list[str], ranks: int = 1) -> subprocess.CompletedProcess[str]:
    started = command(tuple(overrides), ranks)
    started[started.index("moe")] = "tests.faults.inject"
    more = environment({"FAULT": json.dumps(fault)})
    return forkserver.run(started, capture_output=True, text=True, timeout=120, env=more, check=False)

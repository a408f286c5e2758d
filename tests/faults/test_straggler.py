"""A rank that needs 200 ms more a step is named within 20 steps; ordinary noise names no rank."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from torch._C._distributed_c10d import ProcessGroup, Work

from moe.config.compose import load_config
from moe.distributed import rendezvous
from moe.distributed.collective_timing import COLLECTIVES, CollectiveTiming
from moe.train.straggler import AGAIN, SMALLEST, STEADY, WINDOW, Straggler
from tests.e2e.conftest import SMALL, queued_seconds, read_metrics
from tests.faults.forked import Finished, moe_here, moe_ranks
from tests.ranks import run_ranks

SLOW = {"kind": "sleep", "seconds": 0.2, "rank": 1}
ONLY_STEPS = ["train.eval_every=100", "train.sample_every=100", "checkpoint.every=100"]


@pytest.mark.fault(14)
@pytest.mark.parametrize("expert_parallel_size", [1, 2])
def test_the_slow_rank_is_named_within_20_steps(
    expert_parallel_size: int, corpus: list[str], tmp_path: Path, outcome: Callable[[str], None]
) -> None:
    overrides = [*corpus, *SMALL, *ONLY_STEPS, "guard.name_stragglers=true", "train.steps=20"]
    overrides += [f"parallel.expert_parallel_size={expert_parallel_size}"]
    done = moe_ranks("train", f"run_dir={tmp_path}", *overrides, ranks=2, faults=(SLOW,))
    assert [rank.code for rank in done] == [0, 0], done[0].err
    named = re.findall(r"^warning: step (\d+): rank (\d+) on \S+ is slow", done[0].out, re.MULTILINE)
    assert len(named) == 1, done[0].out
    step, rank = map(int, named[0])
    assert rank == 1
    assert "is slow" not in done[1].out, "only rank 0 prints"
    measured = read_metrics(tmp_path)[step - 1 :]
    assert measured[0]["slowest_rank"] == 1
    # In one window at least: other load may make either rank slower for a while.
    excess = min((row["straggler_seconds"] for row in measured), key=lambda seconds: abs(seconds - 0.2))
    assert excess == pytest.approx(0.2, abs=0.1)
    outcome(f"EP {expert_parallel_size}: rank 1 named at step {step}, its excess measured as {excess:.2f} s")


def _train_and_queue(overrides: list[str]) -> tuple[Finished, float]:
    """A rank's run, and the seconds for which it waited for a core from its first step to its last."""
    queued, begin = list[float](), CollectiveTiming.begin

    def noted(timing: CollectiveTiming) -> None:
        queued.append(queued_seconds(os.getpid()))
        begin(timing)

    CollectiveTiming.begin = noted
    done = moe_here(overrides, (), {})
    assert queued, done.err
    return done, queued[-1] - queued[0]


@pytest.mark.fault(14)
def test_without_a_straggler_no_rank_is_named(
    corpus: list[str], tmp_path: Path, outcome: Callable[[str], None]
) -> None:
    overrides = [*corpus, *SMALL, *ONLY_STEPS, "guard.name_stragglers=true", "train.steps=60"]
    overrides += ["parallel.expert_parallel_size=2"]
    results = run_ranks(2, _train_and_queue, ["train", f"run_dir={tmp_path}", *overrides], timeout=240)
    assert [rank.code for rank, _ in results] == [0, 0], results[0][0].err
    assert read_metrics(tmp_path)[0]["slowest_rank"] is None
    named = re.findall(r"rank (\d+) on \S+ is slow", results[0][0].out)
    for rank in map(int, named):  # rightly, if other load kept it from its core in as many steps as it takes
        assert results[rank][1] - results[1 - rank][1] > STEADY * SMALLEST, results[0][0].out
    if not named:
        outcome("60 steps without a straggler: no warning")


def _warnings(steps: list[list[float]], seconds: float = 1.0) -> list[str]:
    """The warnings over `steps`, each the busy seconds by rank of a step that takes `seconds`."""
    warnings: list[str] = []
    straggler = Straggler([f"host{rank}" for rank in range(len(steps[0]))], warnings.append)
    for step, busy in enumerate(steps, 1):
        straggler(step, seconds, busy)
    return warnings


def test_when_a_rank_counts_as_slow() -> None:
    slow = [0.3, 0.3, 0.3, 0.6]
    (warning,) = _warnings([slow] * (AGAIN + WINDOW - 1))
    assert warning.startswith(
        f"step {WINDOW}: rank 3 on host3 is slow: it computes 0.6 s a step, the other ranks 0.3 s"
    )
    assert len(_warnings([slow] * (AGAIN + WINDOW))) == 2, "repeated after AGAIN steps"
    assert len(_warnings([slow] * 20 + [[0.3, 0.6, 0.3, 0.3]] * 20)) == 2, "another slow rank is named at once"
    assert not _warnings([slow] * 100, seconds=2.0), "a small part of the step"
    assert not _warnings([[0.001, 0.02]] * 100, seconds=0.03), "milliseconds"
    assert not _warnings([[0.3, 0.3], [0.3, 0.9], [0.3, 0.3]] * 50), "only in some steps"
    assert not _warnings([[0.9, 0.9, 0.8, 0.9]] * 100), "a rank that is fast"
    assert not _warnings([[0.0, 0.0]] + [[1.0, 1.0], [1.0, 0.0]] * 50), "no time measured yet"
    assert not _warnings([[5.0]] * 100), "no rank to compare with"


def _methods() -> dict[str, object]:
    return {name: vars(ProcessGroup).get(name) for name in COLLECTIVES} | {"wait": vars(Work).get("wait")}


def _patched(enabled: bool) -> list[bool]:
    """Whether torch's methods are others while collectives are timed, and afterwards."""
    before = _methods()
    timing = CollectiveTiming(rendezvous.start(1), enabled=enabled)
    during = _methods()
    timing.remove()
    return [during != before, _methods() != before]


@pytest.mark.parametrize("enabled", [True, False])
def test_torch_is_patched_only_where_it_was_asked_for(enabled: bool) -> None:
    assert run_ranks(2, _patched, enabled) == [[enabled, False]] * 2
    assert load_config([]).guard.name_stragglers is False

"""A rank that needs 200 ms more a step is named within 20 steps; ordinary noise names no rank."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from torch._C._distributed_c10d import ProcessGroup, Work

from moe.config.compose import load_config
from moe.distributed import rendezvous
from moe.distributed.collective_timing import COLLECTIVES, CollectiveTiming
from moe.train.straggler import AGAIN, WINDOW, Straggler
from tests.e2e.conftest import SMALL, read_metrics
from tests.faults.forked import moe_ranks
from tests.ranks import run_ranks

SLOW = {"kind": "sleep", "seconds": 0.2, "rank": 1}
ONLY_STEPS = ["train.eval_every=100", "train.sample_every=100", "checkpoint.every=100"]


@pytest.mark.fault(14)
@pytest.mark.parametrize("expert_parallel_size", [1, 2])
def test_the_slow_rank_is_named_within_20_steps(
    expert_parallel_size: int, corpus: list[str], tmp_path: Path, outcome: Callable[[str], None]
) -> None:
    overrides = [*corpus, *SMALL, *ONLY_STEPS, "guard.name_stragglers=true", "train.steps=15"]
    overrides += [f"parallel.expert_parallel_size={expert_parallel_size}"]
    done = moe_ranks("train", f"run_dir={tmp_path}", *overrides, ranks=2, faults=(SLOW,))
    assert [rank.code for rank in done] == [0, 0], done[0].err
    named = re.findall(r"^warning: step (\d+): rank (\d+) on \S+ is slow", done[0].out, re.MULTILINE)
    assert len(named) == 1, done[0].out
    step, rank = map(int, named[0])
    assert (rank, step <= 20) == (1, True)
    assert "is slow" not in done[1].out, "only rank 0 prints"
    last = read_metrics(tmp_path)[-1]
    assert last["slowest_rank"] == 1
    excess = last["straggler_seconds"]
    assert excess == pytest.approx(0.2, abs=0.1)
    outcome(f"EP {expert_parallel_size}: rank 1 named at step {step}, its excess measured as {excess:.2f} s")


@pytest.mark.fault(14)
def test_without_a_straggler_no_rank_is_named(
    corpus: list[str], tmp_path: Path, outcome: Callable[[str], None]
) -> None:
    overrides = [*corpus, *SMALL, *ONLY_STEPS, "guard.name_stragglers=true", "train.steps=60"]
    overrides += ["parallel.expert_parallel_size=2"]
    done = moe_ranks("train", f"run_dir={tmp_path}", *overrides, ranks=2)
    assert [rank.code for rank in done] == [0, 0], done[0].err
    assert "is slow" not in done[0].out
    assert read_metrics(tmp_path)[0]["slowest_rank"] is None
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

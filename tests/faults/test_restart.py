"""Killed ranks: torchrun restarts them, or the same command resumes; the finished run is bitwise the same."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.live import OVERRIDES, TORCHRUN, Live, assert_same_run, gone, last_step, send

Outcome = Callable[[str], None]
KILLS = 20
LATE = 250  # of 300 steps: from here on a rank is killed at once, or a fast machine would finish before all kills


@pytest.mark.fault(2)
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_torchrun_restarts_a_killed_rank(
    corpus: list[str], undisturbed: Callable[..., Path], tmp_path: Path, outcome: Outcome, rank: int
) -> None:
    overrides = [*OVERRIDES, *corpus, f"run_dir={tmp_path / 'run'}"]
    with Live(tmp_path / "run", overrides, (*TORCHRUN, "--max-restarts", "1"), anew=rank == 0) as run:
        run.until_step(12)
        before = run.ranks()
        send(before[rank], signal.SIGKILL)
        killed_at = time.monotonic()
        run.until(lambda: len(run.ranks()) == 2 and not set(run.ranks().values()) & set(before.values()))
        again = time.monotonic() - killed_at
        assert run.wait() == 0, run.output
    assert "resuming from" in run.output
    assert_same_run(tmp_path / "run", undisturbed(2))
    outcome(f"rank {rank} of 2 killed: new ranks after {again:.1f} s, all metrics and tensors bitwise equal")


@pytest.mark.fault(3)
@pytest.mark.slow
@pytest.mark.parametrize("what", ["torchrun alone", "the whole job"])
def test_the_same_command_resumes_after_kill_9(
    corpus: list[str], undisturbed: Callable[..., Path], tmp_path: Path, outcome: Outcome, what: str
) -> None:
    overrides = [*OVERRIDES, *corpus, f"run_dir={tmp_path / 'run'}"]
    with Live(tmp_path / "run", overrides, TORCHRUN) as run:
        run.until_step(12)
        ranks = [*run.ranks().values()]
        assert len(ranks) == 2
        victims = [run.process.pid] if what == "torchrun alone" else [run.process.pid, *ranks]
        killed_at = time.monotonic()
        for pid in victims:
            send(pid, signal.SIGKILL)
        while not all(gone(pid) for pid in ranks):
            assert time.monotonic() < killed_at + 10, "the ranks outlived their torchrun"
            time.sleep(0.01)
        seconds = time.monotonic() - killed_at
        assert run.wait() == -signal.SIGKILL
    with Live(tmp_path / "run", overrides, TORCHRUN) as run:
        assert run.wait() == 0, run.output
    assert "resuming from" in run.output
    assert_same_run(tmp_path / "run", undisturbed(2))
    outcome(f"{what} killed: no rank left after {seconds:.2f} s; resumed, bitwise equal")


@pytest.mark.fault(15)
@pytest.mark.slow
def test_twenty_random_kills_in_one_run(
    corpus: list[str], undisturbed: Callable[..., Path], tmp_path: Path, outcome: Outcome
) -> None:
    """A random rank at a random moment: while it starts, while it resumes, or a few steps after the last kill."""
    folder, dice, long = tmp_path / "run", random.Random(0), "train.steps=300"
    with Live(folder, [*OVERRIDES, *corpus, long, f"run_dir={folder}"], (*TORCHRUN, "--max-restarts", "40")) as run:
        killed_at: list[int] = []  # the last complete step at each kill
        while len(killed_at) < KILLS:
            run.until(lambda: len(run.ranks()) == 2)
            ranks = run.ranks()
            if dice.random() < 0.7:
                seen = run.output.count("\nstep ")  # every start prints its first step
                run.until(lambda seen=seen: run.output.count("\nstep ") > seen)
                goal = min(last_step(folder) + dice.randint(0, 8), LATE)
                run.until(lambda goal=goal: last_step(folder) >= goal)
            until = time.monotonic() + dice.uniform(0, 4 if dice.random() < 0.3 else 0.2)
            run.until(lambda until=until: time.monotonic() >= until or last_step(folder) >= LATE)
            killed_at.append(last_step(folder))
            os.kill(ranks[dice.choice((0, 1))], signal.SIGKILL)
            run.until(lambda ranks=ranks: not set(run.ranks().values()) & set(ranks.values()))
        assert run.wait(120) == 0, run.output
    assert_same_run(folder, undisturbed(2, long))
    outcome(f"{KILLS} kills, the last at step {killed_at[-1]} of 300: finished, all metrics and tensors bitwise equal")

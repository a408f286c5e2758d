"""Signals that stop a run: a checkpoint of the step where it stopped, documented exit codes, a bitwise resume."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moe.train.signals import StopSignals
from tests.faults.forked import moe_ranks
from tests.faults.live import OVERRIDES, TORCHRUN_SH, Live, assert_same_run, checkpoints, send
from tests.ranks import free_port, run_until_dead

Outcome = Callable[[str], None]
SHORT = "train.steps=15"
CODES = {"SIGTERM": 143, "SIGUSR1": 138, "SIGINT": 130}


@pytest.mark.fault(8)
@pytest.mark.parametrize("name", CODES)
def test_one_process_saves_and_resumes(
    corpus: list[str], undisturbed: Callable[..., Path], tmp_path: Path, outcome: Outcome, name: str
) -> None:
    """A second signal arrives during the save: SIGTERM, since a second Ctrl-C would end the process."""
    overrides = [*OVERRIDES, *corpus, SHORT, f"run_dir={tmp_path}"]
    fault = {"kind": "stop", "name": name, "steps": [7], "in_save": "SIGTERM", "save_seconds": 0.2}
    (done,) = moe_ranks(*overrides, faults=(fault,))
    assert done.code == CODES[name], done.err
    assert f"moe: {name}: the run stops after this step" in done.err
    assert "moe: SIGTERM: the run is already stopping" in done.err
    assert f"moe: {name}: stopped after step 7, which is saved in {tmp_path}" in done.err
    assert "Traceback" not in done.err
    assert checkpoints(tmp_path) == [5, 7]
    (resumed,) = moe_ranks(*overrides)
    assert resumed.code == 0, resumed.err
    assert "step_00000007 (step 7," in resumed.out
    assert_same_run(tmp_path, undisturbed(1, SHORT))
    outcome(
        f"{name}: exit code {done.code}, saved at the step, SIGTERM during the save changed nothing, resumed bitwise"
    )


@pytest.mark.fault(8)
def test_all_ranks_stop_after_the_same_step_when_one_is_signalled(
    corpus: list[str], undisturbed: Callable[..., Path], tmp_path: Path, outcome: Outcome
) -> None:
    """After a step that is saved anyway: it is saved only once."""
    overrides = [*OVERRIDES, *corpus, SHORT, f"run_dir={tmp_path}"]
    done = moe_ranks(*overrides, ranks=2, faults=({"kind": "stop", "name": "SIGUSR1", "steps": [10], "rank": 1},))
    assert [one.code for one in done] == [138, 138], done[0].err
    assert "SIGUSR1: stopped after step 10" in done[0].err
    assert done[0].out.count("saved ") == 2
    assert checkpoints(tmp_path) == [5, 10]
    resumed = moe_ranks(*overrides, ranks=2)
    assert [one.code for one in resumed] == [0, 0], resumed[0].err
    assert_same_run(tmp_path, undisturbed(2, SHORT))
    outcome("one of two ranks signalled: both stop after the same step")


def test_a_signal_in_the_last_step_lets_the_run_finish(corpus: list[str], tmp_path: Path) -> None:
    overrides = [*OVERRIDES, *corpus, "train.steps=6", f"run_dir={tmp_path}"]
    (done,) = moe_ranks(*overrides, faults=({"kind": "stop", "name": "SIGTERM", "steps": [6]},))
    assert done.code == 0, done.err
    assert (tmp_path / "report.html").exists()
    assert checkpoints(tmp_path) == [5, 6]


def _signalled_in_a_step_that_fails(error: Exception) -> None:
    with StopSignals(prints=False):
        signal.raise_signal(signal.SIGTERM)
        raise error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1"), -signal.SIGTERM),
        (RuntimeError("shapes differ"), 0),
        (OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)), 0),
    ],
    ids=["another rank's end", "a fault", "a file system's fault"],
)
def test_a_signal_before_another_rank_was_lost_ends_this_one(error: Exception, code: int) -> None:
    """torchrun sends SIGTERM as soon as a rank has ended, perhaps before this one has noticed. An error of this rank's
    own is reported (code 0: `tests.ranks` caught it)."""
    assert run_until_dead(1, _signalled_in_a_step_that_fails, error) == [code]


@pytest.mark.fault(8)
def test_a_second_ctrl_c_ends_the_process_at_once(corpus: list[str], tmp_path: Path, outcome: Outcome) -> None:
    run_dir = tmp_path / "run"
    fault = {"kind": "stop", "name": "SIGINT", "steps": [7], "in_save": "SIGINT", "save_seconds": 60}
    with Live(run_dir, [*OVERRIDES, *corpus, f"run_dir={run_dir}"], more={"FAULT": json.dumps(fault)}) as run:
        run.until(lambda: "stops after this step" in run.output)
        started = time.monotonic()
        assert run.wait(60) == 130, run.output
        seconds = time.monotonic() - started
    assert run.output.endswith("moe: interrupted\n")
    assert "Traceback" not in run.output
    assert checkpoints(run_dir) == [5]
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000005\n"
    outcome(f"a second Ctrl-C ends a save of a minute after {seconds:.1f} s, the older checkpoint is kept")


@pytest.mark.fault(8)
@pytest.mark.slow
@pytest.mark.parametrize("name", CODES)
def test_a_signal_sent_from_another_process(
    corpus: list[str], undisturbed: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    run_dir = tmp_path / "run"
    overrides = [*OVERRIDES, *corpus, f"run_dir={run_dir}"]
    # The fault sends nothing; it only makes SIGINT, which a background job ignores, work. This test sends the signal.
    with Live(run_dir, overrides, more={"FAULT": json.dumps({"kind": "stop", "name": name, "steps": []})}) as run:
        run.until_step(12)
        send(run.process.pid, signal.Signals[name])
        assert run.wait(60) == CODES[name], run.output
    stopped = checkpoints(run_dir)[-1]
    assert f"{name}: stopped after step {stopped}" in run.output
    with Live(run_dir, overrides) as run:
        assert run.wait() == 0, run.output
    assert f"step_{stopped:08d} (step {stopped}," in run.output
    assert_same_run(run_dir, undisturbed(1))


@pytest.mark.fault(8)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_torchrun_forwards_the_signal_and_restarts_nothing(
    corpus: list[str], undisturbed: Callable[..., Path], tmp_path: Path, outcome: Outcome, name: str
) -> None:
    run_dir = tmp_path / "run"
    overrides = [*OVERRIDES, *corpus, f"run_dir={run_dir}"]
    more = {"NPROC": "2", "MAX_RESTARTS": "3", "GRACE": "20", "MASTER_PORT": str(free_port()), "VENV": ""}
    with Live(run_dir, overrides, TORCHRUN_SH, more) as run:
        run.until_step(12)
        send(run.process.pid, signal.Signals[name])
        sent_at = time.monotonic()
        assert run.wait(60) == 1, run.output
        seconds = time.monotonic() - sent_at
    stopped = checkpoints(run_dir)[-1]
    assert f"moe: {name}: stopped after step {stopped}" in run.output
    assert "resuming" not in run.output, "torchrun restarted the ranks"
    assert seconds < 20
    with Live(run_dir, overrides, TORCHRUN_SH, more) as run:
        assert run.wait() == 0, run.output
    assert f"step_{stopped:08d} (step {stopped}," in run.output
    assert_same_run(run_dir, undisturbed(2))
    outcome(
        f"torchrun, {name}: saved and ended after {seconds:.1f} s with exit code 1, nothing restarted, resumed bitwise"
    )

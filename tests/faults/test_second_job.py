"""Two jobs on one run directory: one trains, the other ends with an error."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL, read_metrics
from tests.faults.forked import Finished, moe_here
from tests.ranks import free_port, run_ranks

pytestmark = pytest.mark.fault(11)
SHORT = [*SMALL, "train.steps=100", "train.eval_every=100", "train.sample_every=100", "checkpoint.every=100"]


def _alone(overrides: list[str]) -> Finished:
    """A job of one process, started at the same time as another one."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_PORT=str(free_port()))
    return moe_here(overrides, (), {})


def test_of_two_jobs_started_at_once_one_ends_with_an_error(
    corpus: list[str], tmp_path: Path, outcome: Callable[[str], None]
) -> None:
    overrides = ["train", f"run_dir={tmp_path}", *corpus, *SHORT]
    jobs = run_ranks(2, _alone, overrides)
    assert sorted(job.code for job in jobs) == [0, 2], [job.err for job in jobs]
    (second,) = [job for job in jobs if job.code == 2]
    (line,) = [line for line in second.err.splitlines() if line.startswith("moe:")]
    assert f"run_dir={tmp_path} is in use by process" in line
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 101)), "the other is undisturbed"
    outcome(
        "two started at once: one trains all its steps, the other ends with exit code 2 and names the first's process"
    )

"""A rank that stops in a step: the watchdog names it and prints the stacks, and torchrun restarts all ranks."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.live import OVERRIDES, TORCHRUN, Live, assert_same_run, gone, send

Outcome = Callable[[str], None]
HANG_SECONDS = 6.0


@pytest.mark.fault(7)
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_and_the_run_is_restarted(
    corpus: list[str], undisturbed: Callable[..., Path], tmp_path: Path, outcome: Outcome, rank: int
) -> None:
    folder = tmp_path / "run"
    overrides = [*OVERRIDES, *corpus, f"guard.hang_seconds={HANG_SECONDS}", f"run_dir={folder}"]
    with Live(folder, overrides, (*TORCHRUN, "--max-restarts", "1")) as run:
        run.until_step(12)
        ranks = run.ranks()
        send(ranks[rank], signal.SIGSTOP)
        stopped_at = time.monotonic()
        run.until(lambda: all(gone(pid) for pid in ranks.values()))
        seconds = time.monotonic() - stopped_at
        assert run.wait() == 0, run.output
    live = 1 - rank
    assert f"[rank {live} of 2] rank {rank} is stopped or its machine is gone: process {ranks[rank]} on" in run.output
    assert f"[rank {live} of 2] stacks of all threads:" in run.output
    # The live rank waited in a collective, whichever came next.
    collective = rf'^\[rank {live} of 2\]   File "\S+torch/distributed/distributed_c10d\.py", line \d+ in '
    assert re.search(collective, run.output, re.M)
    assert seconds < 3 * HANG_SECONDS
    assert "resuming from" in run.output
    assert_same_run(folder, undisturbed(2))
    outcome(
        f"guard.hang_seconds={HANG_SECONDS:g}, rank {rank} of 2 stopped: named, stacks printed, both ranks ended after "
        f"{seconds:.1f} s, restarted, bitwise equal"
    )

"""The watchdog's report of a rank that stops, sleeps or dies: forked ranks without a model."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moe.config.train import MAX_HANG_SECONDS, GuardConfig
from moe.distributed import rendezvous
from moe.train.watchdog import EXIT_CODE, LONG, Watchdog
from tests.ranks import run_ranks, run_until_dead

SECONDS = 3.0  # a live rank posts at least once in 0.9 s, also on a busy machine
Act = Callable[[int], None]


def _work(logs: Path, act: Act) -> None:
    """Two steps, the second of which runs `act(rank)`; then a third, which begins with a collective."""
    mesh = rendezvous.start(1)
    os.dup2(os.open(logs / str(mesh.rank), os.O_WRONLY | os.O_CREAT), 2)
    with Watchdog(mesh, SECONDS) as watchdog:
        for step in (1, 2):
            watchdog.beat(step, "its start")
            time.sleep(SECONDS / 3)
        act(mesh.rank)
        watchdog.beat(3, "its start")
        mesh.barrier()
    rendezvous.stop()


def _ended(tmp_path: Path, act: Act, ranks: int) -> tuple[list[int], list[str], float]:
    """(exit codes, texts on stderr, seconds until the end) of ranks that hang, the first two by rank."""
    started = time.monotonic()
    codes = run_until_dead(ranks, _work, tmp_path, act, timeout=40)
    seconds = time.monotonic() - started
    return codes, [(tmp_path / str(rank)).read_text() for rank in range(ranks)], seconds


def _stop_rank_1(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def _rank_1_sleeps(rank: int) -> None:
    if rank == 1:
        time.sleep(60)


def _rank_0_dies_and_1_sleeps(rank: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _all_pass(rank: int) -> None:
    del rank


@pytest.mark.fault(7)
def test_a_stopped_rank_is_named_and_killed_and_all_others_write_their_stacks(
    tmp_path: Path, outcome: Callable[[str], None]
) -> None:
    codes, texts, seconds = _ended(tmp_path, _stop_rank_1, 3)
    assert codes == [EXIT_CODE, -signal.SIGKILL, EXIT_CODE]
    for rank in (0, 2):
        assert f"[rank {rank} of 3] rank 1 is stopped or its machine is gone: process " in texts[rank]
        assert ", in step 2, its start" in texts[rank]
        assert f"[rank {rank} of 3] stacks of all threads:" in texts[rank]
        assert " in barrier" in texts[rank]
        assert f"(guard.hang_seconds={SECONDS:g})" in texts[rank]
    assert texts[1] == ""
    assert seconds < 25
    outcome(f"one of three ranks stopped: named by both others, whose stacks are printed, all ended with {EXIT_CODE}")


def _no_temporary_files_and_rank_1_stops(rank: int) -> None:
    tempfile.tempdir = "/nowhere"
    with pytest.raises(OSError, match="nowhere"):
        tempfile.mkstemp()
    _stop_rank_1(rank)


@pytest.mark.fault(20)
def test_the_report_needs_no_temporary_file(tmp_path: Path, outcome: Callable[[str], None]) -> None:
    codes, texts, _ = _ended(tmp_path, _no_temporary_files_and_rank_1_stops, 2)
    assert codes == [EXIT_CODE, -signal.SIGKILL]
    assert "[rank 0 of 2] rank 1 is stopped or its machine is gone: process " in texts[0]
    assert " in barrier" in texts[0]
    outcome("no file can be made: rank named, stacks printed, the stopped rank ended")


def test_a_live_rank_that_is_behind_is_named_with_its_stack(tmp_path: Path) -> None:
    codes, texts, _ = _ended(tmp_path, _rank_1_sleeps, 2)
    assert codes == [EXIT_CODE, EXIT_CODE]
    assert "[rank 0 of 2] no rank is stopped; rank 1 is alive but behind: process " in texts[0]
    assert "rank 1 is alive but behind (this one)" in texts[1]
    assert " in _rank_1_sleeps" in texts[1]


def test_a_store_that_is_gone_is_reported(tmp_path: Path) -> None:
    codes, texts, _ = _ended(tmp_path, _rank_0_dies_and_1_sleeps, 2)
    assert codes == [-signal.SIGKILL, EXIT_CODE]
    assert "the ranks' store is gone: rank 0's torchrun or machine has ended" in texts[1]
    assert " in _rank_0_dies_and_1_sleeps" in texts[1]


def test_one_process_ends_itself(tmp_path: Path) -> None:
    codes, texts, _ = _ended(tmp_path, lambda rank: time.sleep(60), 1)
    assert codes == [EXIT_CODE]
    assert "rank 0 of 1: no progress for" in texts[0]
    assert "<lambda>" in texts[0]


def test_ranks_that_make_progress_are_left_alone(tmp_path: Path) -> None:
    run_ranks(2, _work, tmp_path, _all_pass, timeout=40)
    assert [(tmp_path / name).read_text() for name in ("0", "1")] == ["", ""]


def test_a_process_that_was_stopped_as_a_whole_continues(tmp_path: Path) -> None:
    """Ctrl-Z and fg: the watchdog was stopped too, so this is no hang."""

    def nap(rank: int) -> None:
        if rank == 0 and os.fork() == 0:
            time.sleep(2 * SECONDS)
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSTOP)

    run_ranks(1, _work, tmp_path, nap, timeout=40)
    assert (tmp_path / "0").read_text() == ""


def test_the_collectives_time_out_is_longer_than_the_watchdogs() -> None:
    """Otherwise a collective would end the run first, without naming a rank."""
    assert rendezvous.COLLECTIVE_TIMEOUT.total_seconds() > LONG * MAX_HANG_SECONDS
    with pytest.raises(ValueError, match=r"guard\.hang_seconds=1200\.0 must be ≤ 850"):
        GuardConfig(hang_seconds=1200.0)

"""A run directory that goes away while the run writes it, locks that are no files, and a node with other code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL, environment
from tests.faults.forked import moe_ranks
from tests.faults.live import OVERRIDES, ROOT, TORCHRUN, Live, assert_same_run
from tests.ranks import free_port

Outcome = Callable[[str], None]


def _removed(run_dir: Path) -> None:
    while run_dir.exists():  # a file may be written between the listing and the removal
        shutil.rmtree(run_dir, ignore_errors=True)


def _renamed(run_dir: Path) -> None:
    run_dir.rename(run_dir.with_name("elsewhere"))


def _replaced(run_dir: Path) -> None:
    _renamed(run_dir)
    unfinished = shutil.ignore_patterns("*.partial")  # a save goes on in them, and renames them in the middle of a copy
    shutil.copytree(run_dir.with_name("elsewhere"), run_dir, ignore=unfinished)


@pytest.mark.fault(19)
@pytest.mark.parametrize(
    "lose", [_removed, *(pytest.param(one, marks=pytest.mark.slow) for one in (_renamed, _replaced))]
)
@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["one process", "two ranks"])
def test_a_lost_run_directory_ends_the_run(
    corpus: list[str],
    undisturbed: Callable[..., Path],
    tmp_path: Path,
    outcome: Outcome,
    lose: Callable[[Path], None],
    launcher: tuple[str, ...],
) -> None:
    run_dir = tmp_path / "runs" / "one"
    overrides = [*OVERRIDES, *corpus, f"run_dir={run_dir}"]
    with Live(run_dir, overrides, launcher) as run:
        run.until_step(7)
        lose(run_dir)
        code = run.wait(60)
    assert code == 1
    lines = [line for line in run.output.splitlines() if line.startswith("moe: ")]
    assert len(lines) == 1, run.output
    assert f"run_dir={run_dir} was removed, renamed or replaced while this run wrote it" in lines[0]
    if lose is _removed:
        assert not run_dir.exists(), "no half run directory is made anew"
        return
    if lose is _replaced:
        shutil.rmtree(run_dir)
    run_dir.with_name("elsewhere").rename(run_dir)
    (resumed, *_) = moe_ranks(*overrides, ranks=2 if launcher else 1)
    assert resumed.code == 0, resumed.err
    assert_same_run(run_dir, undisturbed(2 if launcher else 1))
    outcome("removed, renamed or replaced: exit code 1 and one line at the next step; brought back: bitwise resume")


def _link(lock: Path) -> None:
    target = lock.with_name("precious")
    target.write_text("keep me")
    lock.symlink_to(target)


@pytest.mark.fault(19)
@pytest.mark.parametrize("make", [_link, os.mkfifo, Path.mkdir], ids=["link", "fifo", "folder"])
def test_a_lock_that_is_no_file_is_an_error(corpus: list[str], tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / ".lock")
    done = moe_ranks("train", *SMALL, *corpus, f"run_dir={tmp_path}")[0]
    assert done.code == 2
    assert f"{tmp_path / '.lock'}: must be a plain file" in done.err
    assert make is not _link or (tmp_path / "precious").read_text() == "keep me"


@pytest.mark.fault(17)
def test_a_node_with_other_code_is_named(corpus: list[str], tmp_path: Path, outcome: Outcome) -> None:
    """Two ranks, of which the second runs a copy of the package with one comment more."""
    stale = tmp_path / "stale"
    for name in ("moe", "configs"):
        shutil.copytree(ROOT / name, stale / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (stale / "moe" / "sparse" / "balance.py").open("a") as file:
        file.write("# a line that the other node doesn't have\n")
    shared = environment({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"})
    shared |= {"MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "moe", "train", *SMALL, *corpus, f"run_dir={tmp_path / 'run'}"]
    ranks = [
        subprocess.Popen(
            command,
            cwd=folder,
            env=shared | {"RANK": str(rank), "PYTHONPATH": str(folder)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank, folder in enumerate((ROOT, stale))
    ]
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], said
    (line,) = [line for line in said[0].splitlines() if line.startswith("moe: ")]
    assert "the ranks run different code: moe=" in line
    assert "on rank 0, " in line
    assert line.endswith("on rank 1: install the same versions on every node, of moe's source too")
    assert not (tmp_path / "run").exists(), "nothing was trained"
    outcome("a package that differs in one comment: named before the first step, exit code 2, nothing written")

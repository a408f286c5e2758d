"""One job a directory."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path

import pytest

from moe.errors import UserError
from moe.locks import RunLock


def test_a_second_job_is_refused_and_the_holder_named(tmp_path: Path) -> None:
    held = RunLock(tmp_path)
    with pytest.raises(ValueError, match=r"run_dir=.* is in use by process \d+ on .*choose another run_dir"):
        RunLock(tmp_path)
    held.close()
    RunLock(tmp_path).close()


def test_a_holder_that_has_only_just_locked_is_waited_for(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        threading.Timer(0.2, lambda: (held.write("process 7 on here\n"), held.flush())).start()
        with pytest.raises(ValueError, match="is in use by process 7 on here"):
            RunLock(tmp_path)


def test_jobs_that_share_a_directory_keep_those_out_that_do_not(tmp_path: Path) -> None:
    one, other = RunLock(tmp_path, shared=True), RunLock(tmp_path, shared=True)
    one.close()
    with pytest.raises(ValueError, match="is in use by process"):
        RunLock(tmp_path)
    other.close()
    RunLock(tmp_path).close()
    held = RunLock(tmp_path)
    with pytest.raises(ValueError, match="is in use by process"):
        RunLock(tmp_path, shared=True)
    held.close()


def test_a_run_directory_that_can_not_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(
            UserError, match=r"run_dir=.*: can't be made \((File exists|Not a directory)\): name another"
        ):
            RunLock(folder)

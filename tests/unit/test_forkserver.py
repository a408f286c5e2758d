"""A forked process is like one that Python starts anew (tests/forkserver.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import forkserver
from tests.e2e.conftest import environment
from tests.faults.live import TORCHRUN, gone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
PROBE = [sys.executable, "-m", "tests.forked_probe"]
ENDS = {"0": 0, "7": 7, "300": 44, "signal": -signal.SIGTERM, "interrupt": -signal.SIGINT, "text": 1, "fault": 1}
ENDS |= {"thread": 0}


def ended(starter: Any, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    usual = {"capture_output": True, "text": True, "timeout": 100, "input": "given", "check": False}
    return starter.run([*PROBE, *arguments], **usual | {"cwd": forkserver.ROOT} | more)


def seen(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return json.loads(done.stdout.splitlines()[0])


@pytest.mark.parametrize("more", [{}, {"start_new_session": True}, {"process_group": 0}], ids=str)
def test_it_sees_what_a_new_one_sees(more: dict[str, Any], tmp_path: Path) -> None:
    more |= {"cwd": tmp_path, "env": environment({"RANK": "1", "MOE_ONLY_HERE": "a b=c"})}
    new, forked = (seen(ended(starter, "0", "b c", "", "ü", **more)) for starter in (subprocess, forkserver))
    assert new.pop("pid") != forked.pop("pid")
    assert [one.pop("forked") for one in (new, forked)] == [False, True]
    forked["path"] = forked["path"][: len(new["path"])]  # setuptools, which is imported already, has appended a folder
    assert new.pop("drawn") != forked.pop("drawn")
    assert forked == new
    assert forked["parent"] == os.getpid()


@pytest.mark.parametrize("how", ENDS)
def test_it_ends_like_a_new_one(how: str) -> None:
    new, forked = ended(subprocess, how), ended(forkserver, how)
    assert new.returncode == forked.returncode == ENDS[how]
    assert forked.stdout.splitlines()[1:] == new.stdout.splitlines()[1:]
    assert forked.stderr.splitlines()[:1] == new.stderr.splitlines()[:1]
    assert forked.stderr.splitlines()[-1:] == new.stderr.splitlines()[-1:]
    assert ("Traceback" in forked.stderr) == ("Traceback" in new.stderr) == (how in ("fault", "interrupt"))


def test_limits_and_checks_are_subprocesss() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        ended(forkserver, "sleep", timeout=0.5)
    with pytest.raises(subprocess.CalledProcessError):
        ended(forkserver, "7", check=True)


def test_what_needs_a_new_process_gets_one() -> None:
    def is_forked(**more: Any) -> bool:
        return seen(ended(forkserver, "0", **more))["forked"]

    assert is_forked()
    assert is_forked(env=environment({"RANK": "0", "WANDB_MODE": "offline"}))
    assert not is_forked(env=environment({"OMP_NUM_THREADS": "2"}))
    assert not is_forked(env=environment({"LD_PRELOAD": ""}))
    assert not is_forked(preexec_fn=os.getpid)


def test_torchruns_ranks_are_its_children_and_die_with_it(tmp_path: Path) -> None:
    command = [*TORCHRUN, "-m", "tests.forked_probe", "sleep"]
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("w") as stdout, err.open("w") as stderr:
        torchrun = forkserver.Popen(command, env=environment(), stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
    try:
        while out.read_text().count("\n") < 2:
            assert torchrun.poll() is None, err.read_text()
            time.sleep(0.02)
    finally:
        torchrun.kill()
    assert torchrun.wait(10) == -signal.SIGKILL
    ranks = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["forked"] for one in ranks] == [True, True]
    assert {one["environment"]["RANK"] for one in ranks} == {"0", "1"}
    assert [one["parent"] for one in ranks] == [torchrun.pid] * 2
    assert [one["leads"] for one in ranks] == [[True, True]] * 2
    deadline = time.monotonic() + 10
    while not all(gone(one["pid"]) for one in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.02)

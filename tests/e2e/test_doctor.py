"""`moe doctor` at the command line: one JSON object, a table, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forkserver


def doctor(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moe", "doctor", *arguments]
    return forkserver.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_json_holds_every_check(tmp_path: Path) -> None:
    done = doctor("--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["ok"] is True
    names = {check["name"] for check in said["checks"]}
    assert {"Python", "packages", "torch", "attention", "experts", "cores", "memory", "limits", "run_dir"} <= names
    assert {"shared files", "data.cache_dir", "W&B", "port", "training", "speed"} <= names
    assert {check["state"] for check in said["checks"]} <= {"ok", "note"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_fails_is_in_the_table_and_the_exit_code_is_1(tmp_path: Path) -> None:
    done = doctor("run_dir=/proc/runs", folder=tmp_path)
    assert done.returncode == 1
    assert "can't write to /proc" in " ".join(done.stdout.split())
    assert "1 fail" in done.stdout


def test_a_bad_argument_is_one_line(tmp_path: Path) -> None:
    done = doctor("run=x", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "moe: doctor run=x: its keys are run_dir=…, data.cache_dir=… and --json\n"

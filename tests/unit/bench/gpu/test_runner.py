"""A stage of the GPU report that fails, dies or hangs is recorded, and the others run, all within the report's time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moe.bench.gpu.runner import Stage, run_report
from moe.bench.gpu.settings import Settings
from tests.faults.live import gone

ROOT = Path(__file__).resolve().parents[4]
FAKES = {
    "good": """
        record.facts(size=3)
        record.row("times", name="a", ms=1.5)
        record.row("times", name="b", ms=None)
        record.check("error", 0.01, 0.1)
        record.headline("all is well")
    """,
    "raises": """
        record.headline("half of it")
        raise RuntimeError("no such kernel")
    """,
    "wrong": """
        record.check("error of the gradient", 0.5, 0.1)
    """,
    "hangs": """
        record.facts(before=1)
        child = subprocess.Popen(["sleep", "600"])
        (settings.out / "child").write_text(str(child.pid))
        time.sleep(600)
    """,
    "dies": """
        os.kill(os.getpid(), 9)
    """,
}


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`report(seconds, (fake stage, limit), …)` returns whether all stages passed, and report.json's content."""
    for name, body in FAKES.items():
        text = f"import os, subprocess, time\n\n\ndef run(settings, record):{body}"
        (tmp_path / f"fake_{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    work.mkdir()

    def start(seconds: float, *stages: tuple[str, float]) -> tuple[bool, dict[str, Any]]:
        listed = [Stage(name, limit, f"what {name} is about", f"fake_{name}") for name, limit in stages]
        passed = run_report(listed, Settings(True, out, "", str(work)), seconds)
        return passed, json.loads((out / "report.json").read_text())

    return start


def test_a_failed_stage_is_recorded_and_the_others_run(report: Any, tmp_path: Path) -> None:
    passed, values = report(100, ("raises", 30), ("dies", 30), ("wrong", 30), ("good", 30))
    assert not passed
    stages = values["stages"]
    assert [each["state"] for each in stages.values()] == ["failed", "failed", "failed", "passed"]
    assert stages["raises"]["headline"] == "half of it"
    assert stages["raises"]["error"][-1] == "RuntimeError: no such kernel"
    assert stages["dies"]["error"] == ["exit code -9"]
    assert stages["wrong"]["error"] == ["error of the gradient: 0.5 must be ≤ 0.1"]
    assert stages["good"]["tables"] == [
        {"title": "times", "columns": ["name", "ms"], "rows": [["a", 1.5], ["b", None]]}
    ]
    text = (tmp_path / "out/summary.md").read_text()
    assert re.search(r"^\| good \| passed \| \d+ s \| all is well \|$", text, re.MULTILINE)
    assert "RuntimeError: no such kernel" in text
    assert "no such kernel" in (tmp_path / "out/log.txt").read_text()


def _ends(pid: int) -> None:
    """A killed process takes a moment to end."""
    deadline = time.monotonic() + 10
    while not gone(pid):
        assert time.monotonic() < deadline, f"process {pid} goes on"
        time.sleep(0.05)


def test_a_stage_that_hangs_is_killed_with_its_child_processes(report: Any, tmp_path: Path) -> None:
    started = time.monotonic()
    passed, values = report(100, ("hangs", 8), ("good", 30))
    assert time.monotonic() - started < 60
    assert not passed
    hung = values["stages"]["hangs"]
    assert hung["state"] == "timed out"
    assert hung["facts"] == {"before": 1}
    assert hung["error"][0] == "no end within 8 s"
    assert any("in run" in line for line in hung["error"]), hung["error"]  # the stack at which it hung
    assert values["stages"]["good"]["state"] == "passed"
    _ends(int((tmp_path / "out/child").read_text()))


def test_a_stage_with_less_than_half_its_limit_left_is_skipped_by_name(report: Any) -> None:
    passed, values = report(50, ("wrong", 120), ("good", 60))
    assert not passed
    assert [each["state"] for each in values["stages"].values()] == ["skipped", "passed"]
    assert values["stages"]["wrong"]["error"][0].startswith("half its limit of 120 s is over the ")


def test_a_stage_that_gets_less_than_its_limit_is_ended_with_the_reports_time(report: Any) -> None:
    passed, values = report(13, ("hangs", 10))
    assert not passed
    assert values["stages"]["hangs"]["error"][0] == "no end within 8 s"


def test_a_report_that_is_ended_ends_its_stage(tmp_path: Path, report: Any) -> None:
    code = (
        "from pathlib import Path; from moe.bench.gpu.runner import *; stage = Stage('hangs', 90, '', 'fake_hangs'); "
        f"run_report([stage], Settings(True, Path('{tmp_path}/out'), '', '{tmp_path}'), 99)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    child = tmp_path / "out/child"
    deadline = time.monotonic() + 60
    while not (child.exists() and child.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=30) == 143
    _ends(int(child.read_text()))

"""`moe bench gpu`: a stage that fails or hangs is recorded and the others run; the summary, the page and the wheels."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.bench.gpu import STAGES, cuda_tests, data, page, run, wheels
from moe.bench.gpu.measure import relative_error
from moe.bench.gpu.record import Record
from moe.bench.gpu.render import summary
from moe.bench.gpu.requirements import MET, MISSED, REQUIREMENTS
from moe.bench.gpu.runner import Stage, run_report
from moe.bench.gpu.settings import Settings
from moe.bench.peer import IMPLEMENTATIONS
from moe.config.compose import load_config
from moe.data.prepare import prepare
from moe.errors import UserError
from tests.faults.live import gone

ROOT = Path(__file__).resolve().parents[3]
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
    passed, values = report(13, ("hangs", 15))
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_nothing_runs_and_the_report_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run([f"out={tmp_path / 'out'}"])
    assert "no GPU here: nothing was measured" in capsys.readouterr().out
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["stage=layer"], "bench gpu stage=layer: its keys are stages, out, folder, seconds, dry_run"),
        (["stages=layer,peaks"], "stages=layer,peaks: no stage peaks; one of machine, "),
        (["dry_run=yes"], "dry_run=yes must be true or false"),
        (["seconds=0"], "seconds=0 must be a whole number ≥ 1"),
    ],
)
def test_bad_overrides_are_one_line(tmp_path: Path, overrides: list[str], text: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(text)}"):
        run([f"out={tmp_path}", *overrides])


def test_nan_fails_its_check(tmp_path: Path) -> None:
    record = Record(tmp_path / "result.json")
    record.check("loss", math.nan, 1.0)
    record.row("times", ms=math.inf)
    values = json.loads((tmp_path / "result.json").read_text())
    assert values["checks"] == [{"name": "loss", "value": "nan", "limit": 1.0, "passed": False}]
    assert values["tables"][0]["rows"] == [["inf"]]


def test_relative_error_is_the_largest_and_sees_nan() -> None:
    wanted = [torch.tensor([3.0, 4.0]), torch.tensor([1.0])]
    assert relative_error([torch.tensor([3.0, 4.5]), torch.tensor([1.01])], wanted) == pytest.approx(0.1)
    assert math.isnan(relative_error([torch.tensor([math.nan, 4.0]), torch.tensor([2.0])], wanted))


def _report(*, dry_run: bool = False) -> dict[str, Any]:
    stage = {
        "about": "versions and peaks", "limit": 60, "state": "passed", "seconds": 12.3, "error": [],
        "headline": "798 TFLOP/s", "facts": {"copy_GB_per_s": 2987.4, "driver": "580.1"},
        "tables": [{"title": "products", "columns": ["product", "TFLOP_s"], "rows": [["a | b", 797.94]]}],
        "checks": [{"name": "error", "value": 0.5, "limit": 0.1, "passed": False}],
    }  # fmt: skip
    return {
        "version": 2,
        "dry_run": dry_run,
        "started": "2026-01-02 03:04:05",
        "seconds": 99,
        "requirements": [],
        "stages": {"machine": stage},
    }


def test_summary_shows_facts_tables_and_checks() -> None:
    lines = summary(_report()).splitlines()
    assert "| machine | passed | 12 s | 798 TFLOP/s |" in lines
    assert "- copy GB per s: 2,987" in lines
    assert "| a \\| b | 797.9 |" in lines
    assert "| error | 0.5 | 0.1 | NO |" in lines
    assert "Dry run" not in summary(_report())
    assert "Dry run" in summary(_report(dry_run=True))


def test_page_replaces_its_section_and_nothing_else(tmp_path: Path) -> None:
    text = (ROOT / "docs/performance.md").read_text()
    target, source = tmp_path / "performance.md", tmp_path / "report.json"
    target.write_text(text)
    source.write_text(json.dumps(_report()))
    page.write_report(target, source)
    written = target.read_text()
    assert "798 TFLOP/s" in written
    before, after = text.index(page.BEGIN), text.index(page.END)
    assert written.startswith(text[:before])
    assert written.endswith(text[after:])
    page.write_report(target, source)
    assert target.read_text() == written


def test_page_refuses_a_dry_run_and_a_page_without_markers(tmp_path: Path) -> None:
    target, source = tmp_path / "page.md", tmp_path / "report.json"
    target.write_text(f"{page.BEGIN}\n{page.END}\n")
    source.write_text(json.dumps(_report(dry_run=True)))
    with pytest.raises(UserError, match="a dry run's numbers mean nothing"):
        page.write_report(target, source)
    target.write_text("# Performance\n")
    with pytest.raises(UserError, match="must have the lines"):
        page.write_report(target, source)


def test_wheels_are_those_that_a_machine_with_torch_lacks() -> None:
    wanted = dict(line.split("==") for line in wheels.lacking("3.12"))
    assert {
        "deepspeed",
        "hydra-core",
        "omegaconf",
        "antlr4-python3-runtime",
        "sentencepiece",
        "pydantic",
    } <= wanted.keys()
    assert not wanted.keys() & (wheels.THERE | wheels.UNUSED | {wheels.PROJECT})
    assert wanted == {name: importlib.metadata.version(name) for name in wanted}


def test_copied_data_is_found_without_tokenizing(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    data.write(here, pieces=data.TINY_PIECES, max_bytes=data.TINY_BYTES)
    shutil.copytree(here, there, copy_function=shutil.copyfile)  # changes modification times too
    config, said = load_config([*data.overrides(there), "model=small"]), list[str]()
    corpus = prepare(config.data, config.tokenizer, log=said.append)
    assert said == []
    assert corpus.folder.parent == there / data.CACHE


def test_tests_that_need_cuda_are_found() -> None:
    names = [path.name for path in cuda_tests.find()]
    assert "test_attention.py" in names
    assert Path(__file__).name not in names  # it would start the report again


@pytest.mark.parametrize(
    ("script", "arguments", "text"),
    [
        ("gpu_report.sh", ["--fast"], "--fast: the only option is --dry-run"),
        ("gpu_report.sh", ["--dry-run", "a", "b"], "at most one folder of wheels, not: a b"),
        ("gpu_report.sh", ["docs"], "docs holds no wheels: make them with launch/gpu_wheels.sh"),
        ("gpu_wheels.sh", ["docs"], "docs holds other files"),
        ("gpu_wheels.sh", ["--help"], "--help: it has no options"),
    ],
)
def test_scripts_refuse_in_one_line(script: str, arguments: list[str], text: str) -> None:
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith(f"launch/{script}: {text}")
    assert len(done.stderr.splitlines()) == 1
    assert (ROOT / "docs/performance.md").exists()


@pytest.mark.slow
@pytest.mark.timeout(840)
def test_every_stage_passes_its_dry_run(tmp_path: Path) -> None:
    """Takes a minute on an idle machine. The limit is on CPU time, which other load hardly changes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        ["bash", str(ROOT / "launch/gpu_report.sh"), "--dry-run"],
        env=os.environ | {"OUT": str(tmp_path / "out"), "VENV": sys.prefix, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 240
    values = json.loads((tmp_path / "out/report.json").read_text())
    assert {name: each["state"] for name, each in values["stages"].items()} == {
        stage.name: "passed" for stage in STAGES
    }
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) <= 8
    assert all(each["headline"] for each in values["stages"].values())
    stages = values["stages"]
    assert stages["training"]["facts"]["resumed_losses_bit_identical"] == "yes"
    verdicts = {row["required"]: row["verdict"] for row in values["requirements"]}
    assert verdicts.keys() == {each.name for each in REQUIREMENTS}
    assert set(verdicts.values()) <= {MET, MISSED}
    for row in values["requirements"]:
        assert row["stage"] == "memory" or "MaxVio " in row["beside"], row
    for stage, title in (("layer", "back-ends"), ("step", "MFU by routing")):
        rows = _rows(stages[stage], title)
        for own, uniform in zip(rows[::2], rows[1::2], strict=True):
            assert [own["routing"], uniform["routing"]] == ["own", "uniform"]
            assert own["MaxVio"] > 0 == uniform["MaxVio"]
    assert all(row["kept_GiB"] > 0 for row in _rows(stages["layer"], "back-ends"))
    said = [row["said"] for row in _rows(stages["peers"], "before the rounds")]
    for name in IMPLEMENTATIONS:
        assert sum(line.startswith(f"peer's experts, {name}, ") for line in said) == 2  # autocast, bfloat16 weights
    assert [row["layers"] for row in _rows(stages["memory"], "planned and measured")] == ["1", "2", "each further one"]


def _rows(stage: dict[str, Any], title: str) -> list[dict[str, Any]]:
    (found,) = [each for each in stage["tables"] if each["title"] == title]
    return [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]

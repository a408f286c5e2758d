"""`moe bench gpu`: the command, the summary, the page, the wheels, and a dry run of every stage."""

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
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.bench.gpu import STAGES, cuda_tests, data, page, run, wheels
from moe.bench.gpu.measure import relative_error
from moe.bench.gpu.record import Record
from moe.bench.gpu.render import summary
from moe.bench.gpu.requirements import MET, MISSED, REQUIREMENTS
from moe.bench.peer import IMPLEMENTATIONS
from moe.config.compose import load_config
from moe.data.prepare import prepare
from moe.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


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

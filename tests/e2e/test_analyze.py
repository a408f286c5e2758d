"""`moe analyze` on a trained run: its own text, another one, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL, Run

QUICK = ["analyze.sequences=8", "analyze.permutations=5"]
STEPS = ["engine=plain", "train.steps=4", "train.eval_every=4", "train.sample_every=4"]


@pytest.fixture(scope="module")
def run(moe: Run, corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sparse"
    done = moe("train", f"run_dir={folder}", *corpus, *SMALL, *STEPS)
    assert done.returncode == 0, done.stderr
    return folder


def _one_line(done: subprocess.CompletedProcess[str], expected: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("moe: ")]
    assert len(lines) == 1, done.stderr
    assert expected in lines[0]
    assert "Traceback" not in done.stderr


def test_the_runs_own_held_out_text(moe: Run, run: Path) -> None:
    done = moe("analyze", f"checkpoint={run}", *QUICK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(run / "analysis/analysis.html")
    assert (run / "analysis/analysis.html").read_text().startswith("<!doctype html>")
    found = json.loads((run / "analysis/analysis.json").read_text())
    assert found["step"] == 4
    assert [source["name"] for source in found["sources"]] == ["text"]
    assert found["layers"] == [{"layer": 0, "num_experts": 4}, {"layer": 1, "num_experts": 4}]
    assert len(found["leave_out"]["experts"]) == 8
    again = moe("analyze", f"checkpoint={run / 'checkpoints/step_00000004'}", *QUICK)
    assert again.returncode == 0, again.stderr
    same = json.loads((run / "analysis/analysis.json").read_text())
    assert {**same, "checkpoint": ""} == {**found, "checkpoint": ""}, "the same numbers every time"


@pytest.mark.slow
def test_another_text_of_two_sources_with_the_checkpoints_tokenizer(moe: Run, run: Path, tmp_path: Path) -> None:
    sources = []
    for name, line in ("numbers", "{0} plus {0} makes {0}{0}.\n"), ("words", "nobody counts these words {0}\n"):
        (tmp_path / f"{name}.txt").write_text("".join(line.format(index) for index in range(2000)))
        sources.append(f"+data.sources.{name}.path={tmp_path / f'{name}.txt'}")
    done = moe("analyze", f"checkpoint={run}", *sources, f"data.cache_dir={tmp_path / 'cache'}", *QUICK)
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "analysis/analysis.json").read_text())
    assert [(source["name"], source["sequences"]) for source in found["sources"]] == [("numbers", 4), ("words", 4)]
    assert {row["source"] for row in found["assignment"]} == {"numbers", "words"}
    assert {row["about"] for row in found["information"]} == {"token", "position", "source"}
    cached = json.loads(next((tmp_path / "cache").glob("*/meta.json")).read_text())["tokenizer"]
    saved = json.loads((run / "checkpoints/step_00000004/tokenizer/moe_tokenizer.json").read_text())
    assert cached["fingerprint"] == saved["fingerprint"]


@pytest.mark.slow
def test_a_dense_model_has_nothing_to_analyse(moe: Run, corpus: list[str], tmp_path: Path) -> None:
    done = moe("train", f"run_dir={tmp_path}", *corpus, *SMALL, *STEPS, "model.mlp=dense")
    assert done.returncode == 0, done.stderr
    _one_line(
        moe("analyze", f"checkpoint={tmp_path}"), f"checkpoint={tmp_path}: a dense model has no router to analyse"
    )
    assert not (tmp_path / "analysis").exists()


def test_what_is_refused(moe: Run, run: Path, tmp_path: Path) -> None:
    _one_line(moe("analyze", "checkpoint=nowhere"), "checkpoint=nowhere: no checkpoint there")
    _one_line(moe("analyze", f"checkpoint={run}", "data.held_out=0.5"), "data.held_out=0.5 needs a source")
    _one_line(moe("analyze", f"checkpoint={run}", "data.path=nothing.txt"), "data.path=nothing.txt: no such file")
    broken = shutil.copytree(run, tmp_path / "broken")
    for weights in broken.glob("checkpoints/*/model/*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-8])
    _one_line(moe("analyze", f"checkpoint={broken}"), "damaged checkpoint")

"""`moe train experiment=sft`: rows with masks, at two topologies, after kill -9, and from there to text."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from moe.checkpoint.layout import committed
from tests.e2e.conftest import SMALL, command, environment, read_metrics
from tests.faults.forked import moe_ranks

BASE = [*SMALL, "train.steps=2", "train.eval_every=2", "train.sample_every=100", "checkpoint.every=2"]


@pytest.fixture(scope="module")
def start(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that fine-tune a small base on sums, from both kinds of turns."""
    folder = tmp_path_factory.mktemp("sft")
    (done,) = moe_ranks("train", f"run_dir={folder / 'base'}", *corpus, *BASE)
    assert done.code == 0, done.err
    rows = [
        {"prompt": f"How much is {a} plus {b}?", "completion": f"{a} plus {b} makes {a + b}."}
        for a in range(20)
        for b in range(10)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = [one for one in BASE if not one.startswith(("model.", "router.", "train.steps", "checkpoint."))]
    return [
        "experiment=sft", f"init_from={folder / 'base'}", f"data.path={path}", f"data.cache_dir={folder / 'cache'}",
        *sizes, "train.steps=6", "checkpoint.every=2", "data.template=plain",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tuned(start: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "run"
    (done,) = moe_ranks("train", f"run_dir={folder}", *start)
    assert done.code == 0, done.err
    return folder


def _losses(run: Path) -> list[object]:
    return [row["lm_loss"] for row in read_metrics(run)]


def test_the_losses_are_those_of_other_topologies(start: list[str], tuned: Path, tmp_path: Path) -> None:
    topology = ["parallel.expert_parallel_size=2", "parallel.zero_stage=2"]
    done = moe_ranks("train", f"run_dir={tmp_path}", *start, *topology, ranks=2)
    assert [one.code for one in done] == [0, 0], done[0].err
    assert _losses(tmp_path) == pytest.approx(_losses(tuned), rel=2e-6)
    assert _losses(tuned)[-1] < _losses(tuned)[0]  # type: ignore[operator]


def test_kill_9_and_the_same_command_again(start: list[str], tuned: Path, tmp_path: Path) -> None:
    overrides = ("train", f"run_dir={tmp_path}", *start)
    with subprocess.Popen(command(overrides), env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "saved" in line and "step_00000002" in line:
                process.send_signal(signal.SIGKILL)
                break
        assert process.wait(60) == -signal.SIGKILL
    before = committed(tmp_path / "checkpoints")[0].name
    (done,) = moe_ranks(*overrides)
    assert done.code == 0, done.err
    assert f"resuming from {tmp_path / 'checkpoints' / before}" in done.out
    assert _losses(tmp_path) == _losses(tuned)


def test_the_template_goes_along(tuned: Path, tmp_path: Path) -> None:
    newest = committed(tuned / "checkpoints")[0]
    assert (newest / "tokenizer" / "chat_template.jinja").is_file()
    assert (tuned / "checkpoints" / "best").read_text().startswith("step_")
    (done,) = moe_ranks("export", f"checkpoint={tuned}", f"path={tmp_path / 'out'}")
    assert done.code == 0, done.err
    template = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert template == (newest / "tokenizer" / "chat_template.jinja").read_text()
    shutil.rmtree(tmp_path / "out")
    (done,) = moe_ranks("generate", f"checkpoint={tuned}", "prompt=How much is 3 plus 4?", "chat=true")
    assert done.code == 0, done.err


def test_epochs_and_steps_cannot_both_be_stated(start: list[str], tmp_path: Path) -> None:
    (done,) = moe_ranks("train", f"run_dir={tmp_path}", *start, "train.epochs=2")
    assert done.code == 2
    assert "train.epochs=2.0 and train.steps=6 both say how long: leave one out" in done.err

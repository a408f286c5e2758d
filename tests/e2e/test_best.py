"""The best checkpoint by a metric, early stopping, and runs of so many epochs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml

from moe.checkpoint.layout import committed, step_of
from tests.e2e.conftest import SMALL, read_metrics
from tests.faults.forked import moe_ranks

# Overfits: 20 sequences again and again, at a learning rate that soon harms.
RUN = [
    *SMALL, "train.steps=40", "train.eval_every=2", "train.sample_every=100", "checkpoint.every=100",
    "checkpoint.keep=1", "optim.lr=0.1", "checkpoint.metric_for_best_model=val_loss",
]  # fmt: skip


def _steps(run: Path) -> list[int]:
    return sorted(step_of(folder) for folder in committed(run / "checkpoints"))


def test_the_best_checkpoint_is_kept_and_training_ends_early_also_after_a_resume(
    corpus: list[str], tmp_path: Path
) -> None:
    stop = "checkpoint.early_stopping_patience=3"
    overrides = [f"run_dir={tmp_path / 'run'}", *corpus, *RUN, stop]
    (done,) = moe_ranks("train", *overrides)
    assert done.code == 0, done.err
    losses = {row["step"]: row["val_loss"] for row in read_metrics(tmp_path / "run") if "val_loss" in row}
    best, last = min(losses, key=losses.__getitem__), max(losses)  # type: ignore[arg-type]
    assert last == best + 6 < 40, "three evaluations after the best one"
    assert f"ends early, best val_loss {losses[best]:.4f} at step {best}" in done.out
    assert _steps(tmp_path / "run") == [best, last]
    named = tmp_path / "run" / "checkpoints" / "best"
    assert named.read_text() == f"step_{best:08d}\n"
    (again,) = moe_ranks("train", *overrides)
    assert "is finished: it ended early" in again.out
    assert len(read_metrics(tmp_path / "run")) == last
    # From the best one on: the same steps, and the same end.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{last:08d}")
    (more,) = moe_ranks("train", *overrides)
    assert more.code == 0, more.err
    assert f"(step {best}, " in more.out
    assert {row["step"]: row["val_loss"] for row in read_metrics(tmp_path / "run") if "val_loss" in row} == losses
    (text,) = moe_ranks("generate", f"checkpoint={named}", "prompt=3 plus", "max_new_tokens=2")
    assert text.code == 0, text.err
    named.write_text("step_00000077\n")
    (wrong,) = moe_ranks("generate", f"checkpoint={named}", "prompt=3 plus", "max_new_tokens=2")
    assert wrong.code == 2
    assert "names 'step_00000077', which is no checkpoint beside it" in wrong.err


def test_a_metric_that_is_not_there_names_those_that_are(corpus: list[str], tmp_path: Path) -> None:
    wrong = "checkpoint.metric_for_best_model=accuracy"
    (done,) = moe_ranks("train", f"run_dir={tmp_path}", *corpus, *RUN, wrong, "train.steps=2")
    assert done.code == 2
    assert "checkpoint.metric_for_best_model=accuracy: an evaluation has no such number; it has" in done.err
    assert "val_loss" in done.err
    (done,) = moe_ranks("train", f"run_dir={tmp_path}", *corpus, *SMALL, "checkpoint.early_stopping_patience=1")
    assert "needs checkpoint.metric_for_best_model" in done.err


def test_epochs(corpus: list[str], tmp_path: Path) -> None:
    overrides = [*corpus, *SMALL, "train.eval_every=100", "train.epochs=0.25", "train.steps=300", "optim.warmup_steps=null"]
    (done,) = moe_ranks("train", f"run_dir={tmp_path / 'run'}", *overrides)
    assert done.code == 0, done.err
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    tokens = json.loads(next(Path(corpus[-1].partition("=")[2]).glob("*/meta.json")).read_text())
    samples = (tokens["sources"]["text"]["train"]["tokens"] - 1) // 64
    assert config["train"]["steps"] == len(read_metrics(tmp_path / "run")) == -(-samples // 16)

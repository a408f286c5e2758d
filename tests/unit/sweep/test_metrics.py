"""What a trial reached, read while its training writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moe.sweep.metrics import Metrics, newest_checkpoint


def _file(path: Path, rows: list[dict[str, Any]]) -> Metrics:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = Metrics(path)
    metrics.read()
    return metrics


def test_the_last_evaluation_and_the_mean_of_the_last_steps(tmp_path: Path) -> None:
    rows = [{"step": step, "max_violation": float(step)} for step in range(1, 11)]
    rows[4]["val_loss"], rows[9]["val_loss"] = 6.0, 5.0
    metrics = _file(tmp_path / "m", rows)
    assert metrics.value("val_loss", 4) == 5.0
    assert metrics.value("max_violation", 4) == 8.5
    assert metrics.evaluations("val_loss") == {5: 6.0, 10: 5.0}


def test_no_router_is_none_and_a_broken_step_is_nan(tmp_path: Path) -> None:
    metrics = _file(tmp_path / "m", [{"step": 1, "max_violation": None, "loss": math.nan}])
    assert metrics.value("max_violation", 5) is None
    assert math.isnan(metrics.value("loss", 5) or 0)


def test_null_after_a_number_is_not_finite(tmp_path: Path) -> None:
    """The tracker writes NaN and infinity as null."""
    rows: list[dict[str, Any]] = [{"step": step, "loss": 1.0, "val_loss": 5.0, "val_entropy": None} for step in (1, 2)]
    rows += [{"step": 3, "loss": None, "val_loss": None, "val_entropy": None}, {"step": 4, "loss": 1.0}]
    metrics = _file(tmp_path / "m", rows)
    assert math.isnan(metrics.value("val_loss", 1) or 0)
    assert math.isnan(metrics.value("loss", 2) or 0)
    assert metrics.value("loss", 1) == 1.0, "the broken step is not among the last"
    assert metrics.value("val_entropy", 2) is None, "it never was a number"
    diverged = _file(tmp_path / "d", [{"step": 1, "val_loss": None}])
    assert math.isnan(diverged.value("val_loss", 1) or 0)


def test_half_a_line_waits_and_a_file_that_was_cut_back_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "m"
    metrics = _file(path, [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}])
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert not metrics.read()
    path.write_text('{"step": 1, "loss": 9.0}\n')
    assert metrics.read()
    assert metrics.rows == {1: {"step": 1, "loss": 9.0}}


def test_an_unknown_metric_names_those_there_are(tmp_path: Path) -> None:
    metrics = _file(tmp_path / "m", [{"step": 1, "loss": 1.0, "max_violation": None, "expert_shares": []}])
    metrics.check(["loss", "max_violation", "val_loss"])  # evaluations come later
    with pytest.raises(ValueError, match="max_violatio: no such metric; did you mean max_violation"):
        metrics.check(["max_violatio"])
    with pytest.raises(ValueError, match="expert_shares: no such metric; There are loss, max_violation"):
        metrics.check(["expert_shares"])


def test_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) == 0
    for name in ("step_00000005", "step_00000010", "step_00000015.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == 10

"""One job a directory, one model for its life; metrics go back to the checkpoint's step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe.compose import load_config, to_yaml
from moe.train import rundir
from moe.train.tracking import cut_back


def test_a_second_job_is_refused_and_the_holder_named(tmp_path: Path) -> None:
    held = rundir.lock(tmp_path)
    with pytest.raises(ValueError, match=r"run_dir=.* is in use by process \d+ on .*choose another run_dir"):
        rundir.lock(tmp_path)
    held.close()
    rundir.lock(tmp_path).close()


def test_another_model_cannot_continue_and_the_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(load_config([])))
    with pytest.raises(ValueError, match=r"model\.hidden_size=256, but the checkpoint .* model\.hidden_size=128"):
        rundir.check_resumable(tmp_path, load_config(["model.hidden_size=256"]))
    with pytest.raises(ValueError, match=r"router\.num_experts=4"):
        rundir.check_resumable(tmp_path, load_config(["router.num_experts=4"]))


def test_what_may_change_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(load_config([])))
    changed = load_config(["train.steps=500", "optim.lr=0.5", "model.attention=naive"])
    lines = rundir.check_resumable(tmp_path, changed)
    assert "train.steps: 300 → 500" in lines
    assert "optim.lr: 0.001 → 0.5" in lines
    assert rundir.check_resumable(tmp_path, load_config([])) == []


def test_metrics_are_cut_back_to_the_step_and_a_torn_line_goes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo')
    cut_back(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    cut_back(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()

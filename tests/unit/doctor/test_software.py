"""The checks of packages and of a training step: what is missing or broken is said."""

import os
import sys
from pathlib import Path

import pytest

from moe.doctor import software


def test_a_wrong_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        software, "requires", lambda name: ["numpy>=99", "no-such-package", "rich>=1", "x; extra=='dev'"]
    )
    failed = [one for one in software.packages() if one.state == "fail"]
    assert len(failed) == 1
    assert failed[0].found.startswith("numpy ")
    assert "must be >=99" in failed[0].found
    assert "no-such-package is missing" in failed[0].found
    assert failed[0].fix


def test_every_back_end_is_named_with_its_reason() -> None:
    attention, experts = software.backends()
    assert all(name in attention.found for name in ("auto takes", "varlen", "flex", "block", "naive"))
    assert all(
        name in experts.found for name in ("auto takes", "grouped_mm", "loop", "triton", "per_expert", "megablocks")
    )


def test_a_training_step_runs_with_both_engines() -> None:
    (found,) = software.finish_training(software.start_training(), 120)
    assert found.state == "ok", found
    assert "engine=plain and engine=deepspeed" in found.found


def test_a_broken_deepspeed_is_a_failure_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deepspeed.py").write_text("raise ImportError('this one is broken')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    (found,) = software.finish_training(software.start_training(), 120)
    assert found.state == "fail"
    assert "after engine=plain" in found.found
    assert "this one is broken" in found.found


def test_a_slow_training_step_does_not_hold_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = software.finish_training(software.start_training(), 0.0)
    assert found.state == "note"
    assert "not done after" in found.found


@pytest.mark.parametrize(("variable", "expected"), [("WANDB_MODE", "WANDB_MODE=offline"), ("WANDB_API_KEY", "online")])
def test_the_state_of_tracking(variable: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    assert "offline" in software.tracking()[0].found
    monkeypatch.setenv(variable, "offline")
    assert expected in software.tracking()[0].found

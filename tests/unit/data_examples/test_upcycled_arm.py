"""The upcycled arm's row beside a study, by hand."""

from __future__ import annotations

import json
from pathlib import Path

from data.examples import upcycled_arm
from moe.config.compose import load_config, to_yaml
from tests.unit.report.test_sweep_markdown import made


def test_the_row_by_hand(tmp_path: Path, monkeypatch) -> None:
    study = made(tmp_path / "study", {"aux": (5.0, 5.2, 5.4), "none": (5.1, 5.3, 5.5), "ahead": (5.0, 5.0, 5.0)})
    for seed, loss in enumerate((4.9, 5.101, 5.299)):
        run = tmp_path / "runs" / f"upcycled_{seed}"
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(to_yaml(load_config(["model=tiny"])))
        rows = [{"step": 1, "max_violation": 9.0, "val_loss": 9.0}]
        rows += [{"step": step, "max_violation": 0.25} for step in range(2, 22)]
        rows += [{"step": 22, "max_violation": 0.25, "val_loss": loss}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(upcycled_arm, "BESIDE", ("aux", "ahead"))
    cells = [cell.strip() for cell in upcycled_arm.table(study, tmp_path)[2].strip("|").split("|")]
    # Differences from aux −0.1, −0.099, −0.101: mean −0.1, deviation 0.001, half 4.303 · 0.001/√3.
    assert cells[2:] == ["3", "5.1000 ± 0.2000", "**-0.1000 ± 0.0025**", "+0.1000 ± 0.4956", "0.250 ± 0.000"]


def test_the_trials_are_the_sweeps_own() -> None:
    found = upcycled_arm.overrides()
    assert "model=tiny" in found
    assert "train.steps=780" in found, "launch/examples/upcycled_arm.sh trains two halves of that"

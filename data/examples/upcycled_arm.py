"""The router ablation's upcycled arm, which starts from a dense model and so is no point of the sweep.

python -m data.examples.upcycled_arm overrides                # of the sweep's trials, one a line
python -m data.examples.upcycled_arm table STUDY FOLDER PAGE  # beside the sweep's own arms, into a page's section
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from data.examples.training import active_parameters, runs
from moe.durable import write_section
from moe.report.sweep_markdown import difference_text, mean_text
from moe.report.sweep_reader import POINT, read_sweep
from moe.report.sweep_statistics import Difference, interval, points
from moe.sweep.metrics import Metrics

SWEEP = Path(__file__).resolve().parents[2] / "configs/sweep/router_ablation.yaml"
BEGIN, END = "<!-- upcycled: begin -->", "<!-- upcycled: end -->"
BESIDE = ("aux", "dense")  # arms of the sweep
LAST_STEPS = 20  # whose mean MaxVio is told, as in the sweep


def overrides() -> list[str]:
    return yaml.safe_load(SWEEP.read_text(encoding="utf-8"))["overrides"]


def table(study: Path, folder: Path) -> list[str]:
    """Lines of Markdown. A run FOLDER/runs/upcycled_N is beside the sweep's trials of seed N."""
    sweep, told = read_sweep(study), {}
    losses, violations = {}, {}
    for run in runs(folder, "upcycled_[0-9]*"):
        metrics, seed = Metrics(run / "metrics.jsonl"), int(run.name.rpartition("_")[2])
        metrics.read()
        losses[seed], violations[seed] = metrics.value("val_loss", 1), metrics.value("max_violation", LAST_STEPS)
    assert losses, f"no finished run in {folder}/runs"
    columns = ["arm", "active parameters", "seeds", "val_loss", *(f"minus {name}" for name in BESIDE), "max_violation"]
    cells = ["upcycled", f"{active_parameters(run) / 1e6:.2f} M", str(len(losses)), mean_text([*losses.values()], 4)]
    for point in points(sweep):
        if (name := point.best.params[POINT]) in BESIDE:
            other = {row.seed: row.value("val_loss") for row in point.trials}
            paired = [loss - other[seed] for seed, loss in losses.items() if seed in other]
            told[name] = difference_text(Difference(point, len(paired), *interval(paired)))
    cells += [*(told[name] for name in BESIDE), mean_text([*violations.values()], 3)]
    return [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns), f"| {' | '.join(cells)} |"]


def main() -> None:
    if sys.argv[1] == "overrides":
        print("\n".join(overrides()))
    else:
        study, folder, page = map(Path, sys.argv[2:])
        write_section(page, BEGIN, END, table(study, folder))


if __name__ == "__main__":
    main()

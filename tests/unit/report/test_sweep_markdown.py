"""A sweep's table in a page: differences to a point, MaxVio of summed choices, the text around it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe.errors import UserError
from moe.report.sweep_markdown import BEGIN, END, Size, write_sweep_markdown

LOSSES = {"aux": (5.0, 5.2, 5.4), "none": (5.1, 5.301, 5.499), "ahead": (5.3, 5.4, 5.0)}
# Shares of two experts in one layer: even in the sum, uneven at every step; uneven in both.
SHARES = {"aux": ([0.75, 0.25], [0.25, 0.75]), "none": ([0.75, 0.25], [0.75, 0.25]), "ahead": None}


def made(folder: Path, losses: dict[str, tuple[float, ...]] = LOSSES) -> Path:
    trials = []
    for name, values in losses.items():
        for seed, loss in enumerate(values):
            run_dir = f"trials/{len(trials):04d}"
            (folder / run_dir).mkdir(parents=True)
            rows = [{"step": step, "max_violation": 0.5} for step in (1, 2)]
            if shares := SHARES[name]:
                rows = [row | {"expert_shares": [shares[at]]} for at, row in enumerate(rows)]
            if name == "ahead":
                rows[-1] |= {"val_loss_leaky": loss - 1}
            (folder / run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            trials.append(
                {
                    "trial": len(trials), "params": {"point": name, "router.aux_loss_coef": "0.01"}, "seed": seed,
                    "state": "COMPLETE", "error": "", "seconds": 120.0, "run_dir": run_dir,
                    "metrics": {"val_loss": loss, "max_violation": 0.5 if SHARES[name] else None},
                    "command": [f"train.seed={seed}"],
                }
            )  # fmt: skip
    described = {
        "objectives": ["val_loss", "max_violation"], "maximize": [], "seeds": 3, "sampler": "points", "steps": 2,
        "trials_asked": None, "names": ["point"], "log": [], "importance": {}, "trials": trials,
    }  # fmt: skip
    (folder / "trials.json").write_text(json.dumps(described))
    return folder


def table(folder: Path, reference: str = "aux") -> dict[str, list[str]]:
    """{point: its cells} of a page made of the table alone."""
    page = folder / "page.md"
    write_sweep_markdown(folder, page, reference, lambda _: Size(3_000_000, 1_500_000, 4096))
    lines = [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in lines}


def test_the_table_by_hand(tmp_path: Path) -> None:
    found = table(made(tmp_path))
    assert list(found) == ["point", "---", "aux", "ahead", "none"], "the best first"
    assert found["aux"] == ["3.00 M (1.50 M)", "3", "5.2000 ± 0.2000", "–", "0.500 ± 0.000", "0.000 ± 0.000", "2.0"]
    # Differences 0.1, 0.101, 0.099: mean 0.1, deviation 0.001, half 4.303 · 0.001/√3.
    assert found["none"][3] == "**+0.1000 ± 0.0025**"
    assert found["none"][5] == "0.500 ± 0.000", "2 · 0.75 − 1"
    assert found["ahead"][2] == "5.2333 ± 0.2333 (reading ahead, as trained: 4.233 ± 0.233)"
    assert found["ahead"][3].startswith("+0.0333 ± "), "within noise"
    assert found["ahead"][4:6] == ["–", "–"]


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    found = table(made(tmp_path, {"aux": (5.0,), "none": (5.1,)}))
    assert found["none"][2:4] == ["5.1000", "+0.1000"]


def test_only_what_stands_between_the_markers_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n\n{BEGIN}\nearlier\n{END}\nafter\n")
    folder = made(tmp_path)
    write_sweep_markdown(folder, page, "aux", lambda _: Size(1, 1, 2))
    text = page.read_text()
    assert text.startswith(f"# Before\n\n{BEGIN}\n| point |")
    assert text.endswith(f"\n{END}\nafter\n")
    assert "earlier" not in text
    assert "- none: `router.aux_loss_coef=0.01`" in text
    page.write_text("no markers")
    with pytest.raises(UserError, match="must have the lines"):
        write_sweep_markdown(folder, page, "aux", lambda _: Size(1, 1, 2))
    assert page.read_text() == "no markers"
    with pytest.raises(UserError, match=r"none/page\.md must be a file in a folder that exists"):
        write_sweep_markdown(folder, tmp_path / "none" / "page.md", "aux", lambda _: Size(1, 1, 2))


def test_a_reference_that_is_no_point_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="reference=dense is no point with a complete trial; there are aux, ahead, none"
    ):
        write_sweep_markdown(made(tmp_path), tmp_path / "page.md", "dense", lambda _: Size(1, 1, 2))
    assert not (tmp_path / "page.md").exists()

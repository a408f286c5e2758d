"""Requirements of an H200: met, missed and not measured, from a report's JSON alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moe.bench.gpu import STAGES, page
from moe.bench.gpu.record import Record
from moe.bench.gpu.render import summary
from moe.bench.gpu.requirements import MET, MISSED, REQUIREMENTS, UNMEASURED, judged

GOOD = {"speed": 75.0, "kept": 1.0, "mfu": 50.0, "ratio": 1.5, "shallow": 10.0, "deep": 0.0}
POOR = {"speed": 74.9, "kept": 1.01, "mfu": 49.9, "ratio": 1.49, "shallow": 10.1, "deep": 30.0}


def stages(folder: Path, figures: dict[str, float]) -> dict[str, Any]:
    """What stages that recorded these figures leave in a report."""
    found: dict[str, Any] = {}
    for each in REQUIREMENTS:
        record = found.setdefault(each.stage, Record(folder / f"{each.stage}.json"))
        if each.key in figures:
            record.figure(each.key, figures[each.key], "own routing, MaxVio 0.31")
    about = {"about": "", "limit": 60, "state": "passed", "seconds": 1.0, "error": []}
    return {name: about | json.loads((folder / f"{name}.json").read_text()) for name in found}


def report(folder: Path, figures: dict[str, float]) -> dict[str, Any]:
    measured = stages(folder, figures)
    measured["machine"] = measured["layer"] | {"facts": {"device": "NVIDIA H200"}, "figures": {}}
    values = {"version": 2, "dry_run": False, "started": "2026-01-02 03:04:05", "seconds": 99}
    return json.loads(json.dumps(values | {"requirements": judged(measured), "stages": measured}))


def test_every_requirement_is_of_a_stage_and_has_a_key_of_its_own() -> None:
    assert {each.stage for each in REQUIREMENTS} <= {stage.name for stage in STAGES}
    assert {each.key for each in REQUIREMENTS} == GOOD.keys() == POOR.keys()
    assert len({each.key for each in REQUIREMENTS}) == len(REQUIREMENTS)
    assert all((each.least is None) != (each.most is None) for each in REQUIREMENTS)


@pytest.mark.parametrize(("figures", "verdict"), [(GOOD, MET), (POOR, MISSED), ({}, UNMEASURED)])
def test_a_requirement_is_met_missed_or_not_measured(tmp_path: Path, figures: dict[str, float], verdict: str) -> None:
    rows = judged(stages(tmp_path, figures))
    assert [row["verdict"] for row in rows] == [verdict] * len(REQUIREMENTS)
    assert [row["measured"] for row in rows] == [figures.get(each.key) for each in REQUIREMENTS]


def test_what_is_not_a_number_misses_and_a_report_without_the_stage_is_not_measured(tmp_path: Path) -> None:
    (speed, kept, *others) = judged(stages(tmp_path, {"speed": math.nan, "kept": math.inf}))
    assert (speed["verdict"], kept["verdict"]) == (MISSED, MISSED)
    assert {row["verdict"] for row in [*others, *judged({})]} == {UNMEASURED}


def test_summary_and_page_state_target_figure_and_verdict(tmp_path: Path) -> None:
    values = report(tmp_path, GOOD | {"ratio": 1.234})
    target, source = tmp_path / "page.md", tmp_path / "report.json"
    target.write_text(f"{page.BEGIN}\n{page.END}\n")
    source.write_text(json.dumps(values))
    page.write_report(target, source)
    for text in (summary(values), target.read_text()):
        lines = text.splitlines()
        assert any("required of an H200 in bfloat16" in line and "measured on NVIDIA H200" in line for line in lines)
        (met,) = [line for line in lines if "MFU against the measured product" in line]
        assert "| ≥ 50 % | 50 | met | own routing, MaxVio 0.31 | step |" in met
        (missed,) = [line for line in lines if "transformers' fastest" in line]
        assert "| ≥ 1.5 × | 1.234 | missed | own routing, MaxVio 0.31 | peers |" in missed
